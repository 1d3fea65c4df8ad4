"""Losses on pairs of responses, from the log-probabilities that the policy and the reference give them.

- dpo    −log σ(β (r_c − r_l)), where r = log π(y|x) − log π_ref(y|x)           (arXiv 2305.18290)
- ipo    (r_c / |y_c| − r_l / |y_l| − 1 / 2β)²                                  (arXiv 2310.12036)
- orpo   −β log σ(log odds_c − log odds_l) of the mean log p of a token, and the cross-entropy of prompt and chosen
         response; no reference                                                 (arXiv 2403.07691)
- kto    w_c (1 − σ(β (r_c − z))) and w_l (1 − σ(β (z − r_l))), with z the mean r of responses that do not belong to
         their prompts, at least 0, without a gradient                          (arXiv 2402.01306)
- rpo    KL(Bernoulli(σ(η (s_c − s_l))) ‖ Bernoulli(σ(β (r_c − r_l)))) with the responses' scores s: what is learned is
         by how much the chosen one is better                                   (arXiv 2406.11704)

c is the chosen response, l the rejected one. Letters: P pairs, G segments of each (chosen, rejected, for KTO another).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from train.recipe import Preference


class PairLogprobs(NamedTuple):
    """Sums over tokens, float32."""

    response_PG: Array  # log p of the responses
    text_PG: Array  # log p of the text whose cross-entropy counts; 0 but for the chosen
    reference_PG: Array  # the reference's log p of the responses
    tokens_PG: Array  # of the responses
    text_tokens_PG: Array
    scores_PG: Array
    valid_P: Array  # bool: a pair, not filling


def preference_loss(options: Preference, pairs: PairLogprobs) -> tuple[Array, dict[str, Array]]:
    """(mean loss over the pairs, figures: rewards, their margin and the share of pairs in the right order)."""
    valid_P = pairs.valid_P
    count = jnp.maximum(valid_P.sum(), 1)

    def mean(values_P: Array) -> Array:
        return jnp.where(valid_P, values_P, 0.0).sum() / count

    beta, tokens_PG = options.beta, jnp.maximum(pairs.tokens_PG, 1)
    ratio_PG = pairs.response_PG - pairs.reference_PG
    chosen_P, rejected_P = ratio_PG[:, 0], ratio_PG[:, 1]
    margin_P = beta * (chosen_P - rejected_P)
    figures: dict[str, Array] = {}
    if options.loss == "dpo":
        loss_P = -jax.nn.log_sigmoid(margin_P)
    elif options.loss == "ipo":
        per_token_PG = ratio_PG / tokens_PG
        loss_P = jnp.square(per_token_PG[:, 0] - per_token_PG[:, 1] - 1 / (2 * beta))
    elif options.loss == "kto":
        baseline = jax.lax.stop_gradient(jnp.maximum(mean(ratio_PG[:, 2]), 0.0))
        figures["kl"] = baseline
        of_chosen_P = 1 - jax.nn.sigmoid(beta * (chosen_P - baseline))
        of_rejected_P = 1 - jax.nn.sigmoid(beta * (baseline - rejected_P))
        loss_P = (options.desirable_weight * of_chosen_P + options.undesirable_weight * of_rejected_P) / 2
    elif options.loss == "rpo":
        target_P = options.reward_scale * (pairs.scores_PG[:, 0] - pairs.scores_PG[:, 1])
        share_P = jax.nn.sigmoid(target_P)
        loss_P = share_P * (jax.nn.log_sigmoid(target_P) - jax.nn.log_sigmoid(margin_P))
        loss_P += (1 - share_P) * (jax.nn.log_sigmoid(-target_P) - jax.nn.log_sigmoid(-margin_P))
    else:
        # filling has no tokens: a mean log p of 0 would have infinite odds
        means_PG = jnp.where(valid_P[:, None], pairs.response_PG / tokens_PG, -1.0)
        odds_PG = means_PG - jnp.log(-jnp.expm1(means_PG))
        loss_P = -beta * jax.nn.log_sigmoid(odds_PG[:, 0] - odds_PG[:, 1])
        chosen_P, rejected_P = means_PG[:, 0], means_PG[:, 1]
        margin_P = beta * (chosen_P - rejected_P)
    loss = mean(loss_P)
    cross_entropy = -pairs.text_PG[:, 0].sum() / jnp.maximum(pairs.text_tokens_PG[:, 0].sum(), 1)
    figures |= {
        "reward_chosen": mean(beta * chosen_P),
        "reward_rejected": mean(beta * rejected_P),
        "reward_margin": mean(margin_P),
        "accuracy": mean((margin_P > 0).astype(jnp.float32)),
        "cross_entropy": cross_entropy,
    }
    weight = 1.0 if options.loss == "orpo" else options.sft_weight
    return loss + weight * cross_entropy if weight else loss, figures
