"""Chooses the next token of every slot from its logits, by the sampling parameters of the slot's request.

One compiled program serves a batch of unlike requests, greedy ones and sampled ones, and what no slot asks for costs
nothing; `specialized` leaves out of it what no slot uses, so that it compiles sooner. The order is that of
transformers' processors: repetition penalty, then OpenAI's penalties and bias, the tokens that a constraint allows and
that the tokenizer has, temperature, top-k, top-p, min-p.

Nothing is sorted. Once the constraint is applied, only a token's distance from the likeliest counts, 0 or more; what
remains are all tokens up to some distance, which top-k and top-p find by bisection on the bits of a float32 (tokens of
equal logits go together). Sampling takes a block of the vocabulary by its probability, then a token of the block; its
random numbers depend on the request's seed and step alone, not on its slot or its batch.

B batch, V vocabulary, T tokens of a chunk, N biases or likeliest tokens, W words of 32 bits, G blocks of M tokens.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nemoe_jax.inference.sampling import MAX_BIASES, SamplingParams

_BLOCK = 512  # tokens: about the square root of the vocabulary
_INFINITE = 0x7F800000  # the bits of infinity


class SamplerInputs(NamedTuple):
    """Each slot's sampling parameters, arrays of NumPy or JAX; the shapes depend on B and V alone: one compilation.

    Penalties and biases, or these and all but `known_V`, may be None: see `specialized`.
    """

    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    min_p_B: Any
    repetition_B: Any
    presence_B: Any
    frequency_B: Any
    bias_token_BN: Any  # the vocabulary's size where there is none
    bias_BN: Any
    seed_B2: Any  # upper and lower 32 bits
    known_V: Any | None = None  # bool: embedding rows that stand for a token; the others are never chosen. None: all do


def controls(samplings: Sequence[SamplingParams], vocab: int, known_V: np.ndarray | None = None) -> SamplerInputs:
    """The sampling parameters of a batch's slots, as NumPy arrays.

    Args:
        vocab: embedding rows.
        known_V: which of them stand for a token of the tokenizer, bool; None: all.

    Raises:
        UserError: a bias for a token that is not in the vocabulary.
    """
    bias_token_BN = np.full((len(samplings), MAX_BIASES), vocab, np.int32)
    bias_BN = np.zeros((len(samplings), MAX_BIASES), np.float32)
    for sampling, tokens_N, biases_N in zip(samplings, bias_token_BN, bias_BN, strict=True):
        sampling.check(vocab)
        for at, (token, bias) in enumerate(sampling.logit_bias):
            tokens_N[at], biases_N[at] = token, bias

    def column(name: str, dtype: type = np.float32) -> np.ndarray:
        return np.array([getattr(sampling, name) for sampling in samplings], dtype)

    return SamplerInputs(
        column("temperature"),
        column("top_k", np.int32),
        column("top_p"),
        column("min_p"),
        column("repetition_penalty"),
        column("presence_penalty"),
        column("frequency_penalty"),
        bias_token_BN,
        bias_BN,
        np.array([divmod(sampling.seed % 2**64, 2**32) for sampling in samplings], np.uint32).reshape(-1, 2),
        known_V,
    )


def specialized(inputs: SamplerInputs) -> SamplerInputs:
    """The inputs without what no slot uses, for a smaller program that samples the same tokens.

    There are three: greedy, sampled, and with all that there is as soon as a slot has a penalty or a bias.

    Args:
        inputs: as `controls` gives them.
    """
    neutral = {"repetition_B": 1, "presence_B": 0, "frequency_B": 0, "bias_BN": 0}
    if any((getattr(inputs, name) != value).any() for name, value in neutral.items()):
        return inputs
    inputs = inputs._replace(bias_token_BN=None, **dict.fromkeys(neutral))
    if (inputs.temperature_B > 0).any():
        return inputs
    return inputs._replace(**dict.fromkeys(name for name in inputs._fields if name != "known_V"))


class TokenCounts(NamedTuple):
    """What each row's prompt and answer hold so far: 3 bytes for each token of the vocabulary and row."""

    prompt_BV: jax.Array  # bool
    answer_BV: jax.Array  # uint16: how often

    @staticmethod
    def empty(rows: int, vocab: int) -> "TokenCounts":
        """Nothing yet."""
        return TokenCounts(jnp.zeros((rows, vocab), bool), jnp.zeros((rows, vocab), jnp.uint16))

    def forget(self, row_B: jax.Array) -> "TokenCounts":
        """As if the rows that are marked, bool (B,), had no tokens: new requests took their places."""
        return TokenCounts(*(jnp.where(row_B[:, None], 0, array_BV).astype(array_BV.dtype) for array_BV in self))

    def add_prompt(self, tokens_BT: jax.Array, num_new_tokens_B: jax.Array) -> "TokenCounts":
        """With the first `num_new_tokens_B` tokens of each row of a prompt's chunk."""
        rows, width = tokens_BT.shape
        given_BT = jnp.arange(width) < num_new_tokens_B[:, None]
        token_BT = jnp.where(given_BT, tokens_BT, self.prompt_BV.shape[1])
        return self._replace(prompt_BV=self.prompt_BV.at[jnp.arange(rows)[:, None], token_BT].set(True, mode="drop"))

    def add(self, token_B: jax.Array, row_B: jax.Array) -> "TokenCounts":
        """With one more token of the answer in the rows that are marked, bool (B,)."""
        rows, vocab = self.answer_BV.shape
        at = jnp.arange(rows), jnp.where(row_B & (token_B >= 0), token_B, vocab)
        often_B = self.answer_BV.at[at].get(mode="fill", fill_value=0)
        more_B = jnp.where(often_B == jnp.iinfo(often_B.dtype).max, often_B, often_B + 1)
        return self._replace(answer_BV=self.answer_BV.at[at].set(more_B, mode="drop"))


def sample(
    logits_BV: jax.Array,
    controls: SamplerInputs,
    counts: TokenCounts | None,
    step_B: jax.Array,
    allowed_BW: jax.Array | None = None,
) -> jax.Array:
    """The next token of each row, (B,) int32; −1 where the logits hold NaN, or no token is allowed.

    Args:
        counts: None where no row asks for a penalty.
        step_B: how many tokens each row's request has chosen before.
        allowed_BW: bits of the tokens that may come, uint32 (B, ceil(V / 32)), the lowest bit first; None: all.
    """
    inputs = jax.tree.map(jnp.asarray, controls)
    logits_BV = adjusted(logits_BV, inputs, counts, allowed_BW)
    best_B = logits_BV.max(axis=-1)
    greedy_B = argmax(logits_BV)
    if inputs.temperature_B is None:
        return jnp.where(jnp.isfinite(best_B), greedy_B, -1)
    warm_B = inputs.temperature_B > 0
    drawn_B = lax.cond(warm_B.any(), lambda: draw(weights(logits_BV, inputs), inputs, step_B), lambda: greedy_B)
    return jnp.where(jnp.isfinite(best_B) & (greedy_B >= 0), jnp.where(warm_B, drawn_B, greedy_B), -1)


def adjusted(
    logits_BV: jax.Array, inputs: SamplerInputs, counts: TokenCounts | None, allowed_BW: jax.Array | None = None
) -> jax.Array:
    """The logits in float32 behind penalties and bias; what is not allowed, or no token, has −∞."""
    logits_BV = logits_BV.astype(jnp.float32)
    if counts is not None and inputs.repetition_B is not None:
        asked_B = (inputs.repetition_B != 1) | (inputs.presence_B != 0) | (inputs.frequency_B != 0)
        logits_BV = lax.cond(asked_B.any(), lambda: _penalised(logits_BV, inputs, counts), lambda: logits_BV)
    if inputs.bias_BN is not None:
        biased_BN = inputs.bias_BN != 0
        logits_BV = lax.cond(biased_BN.any(), lambda: _biased(logits_BV, inputs), lambda: logits_BV)
    if allowed_BW is not None:
        logits_BV = jnp.where(_bits(allowed_BW, logits_BV.shape[1]), logits_BV, -jnp.inf)
    if inputs.known_V is not None:
        logits_BV = jnp.where(inputs.known_V, logits_BV, -jnp.inf)
    return logits_BV


def weights(logits_BV: jax.Array, inputs: SamplerInputs) -> jax.Array:
    """What the probabilities are in proportion to, (B, V) float32: 1 for the likeliest token, 0 for what drops out."""
    warmth_B = jnp.where(inputs.temperature_B > 0, inputs.temperature_B, 1)
    distance_BV = (logits_BV.max(axis=-1, keepdims=True) - logits_BV) / warmth_B[:, None]
    few_B, part_B = inputs.top_k_B > 0, inputs.top_p_B < 1
    everything_B = jnp.full(warmth_B.shape, jnp.inf)

    def near(limit_B):
        return jnp.where(distance_BV <= limit_B[:, None], jnp.exp(-distance_BV), 0)

    def by_rank():
        reach_B = _reach(distance_BV, jnp.ones_like(distance_BV), inputs.top_k_B.astype(jnp.float32))
        return jnp.where(few_B, reach_B, jnp.inf)

    def by_share():
        left_BV = near(rank_B)
        return jnp.where(part_B, _reach(distance_BV, left_BV, inputs.top_p_B * left_BV.sum(axis=-1)), jnp.inf)

    rank_B = lax.cond(few_B.any(), by_rank, lambda: everything_B)
    share_B = lax.cond(part_B.any(), by_share, lambda: everything_B)
    return near(jnp.minimum(jnp.minimum(rank_B, share_B), -jnp.log(inputs.min_p_B)))


def scores(logits_BV: jax.Array, token_B: jax.Array, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities (nats) under the model alone: of the tokens, (B,); the `top` likeliest tokens, and theirs."""
    logits_BV = logits_BV.astype(jnp.float32)
    total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    chosen_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)
    best_BN, tokens_BN = lax.top_k(logits_BV, top)
    return (chosen_B1 - total_B1)[:, 0], tokens_BN, best_BN - total_B1


def argmax(logits_BV: jax.Array) -> jax.Array:
    """The first of the largest logits in each row, (B,) int32; −1 where a row holds NaN.

    `argmax` in two passes, which on CPU are eight times as fast; the largest itself does not show NaN there.
    """
    vocab = logits_BV.shape[-1]
    best_B1 = logits_BV.max(axis=-1, keepdims=True)
    token_BV = jnp.where(logits_BV == best_B1, jnp.arange(vocab, dtype=jnp.int32), vocab)
    return jnp.where(jnp.isnan(logits_BV), -1, token_BV).min(axis=-1)


def _penalised(logits_BV: jax.Array, inputs: SamplerInputs, counts: TokenCounts) -> jax.Array:
    """Repetition penalty on prompt and answer, presence and frequency penalty on the answer."""
    repetition_B1 = inputs.repetition_B[:, None]
    answered_BV = counts.answer_BV > 0
    weaker_BV = jnp.where(logits_BV < 0, logits_BV * repetition_B1, logits_BV / repetition_B1)
    logits_BV = jnp.where(counts.prompt_BV | answered_BV, weaker_BV, logits_BV)
    return logits_BV - inputs.presence_B[:, None] * answered_BV - inputs.frequency_B[:, None] * counts.answer_BV


def _biased(logits_BV: jax.Array, inputs: SamplerInputs) -> jax.Array:
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return logits_BV.at[rows_B1, inputs.bias_token_BN].add(inputs.bias_BN, mode="drop")


def _bits(words_BW: jax.Array, vocab: int) -> jax.Array:
    """The first bits of those words as bool (B, V)."""
    bits_BW32 = (words_BW[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits_BW32.reshape(len(words_BW), -1)[:, :vocab].astype(bool)


def _reach(distance_BV: jax.Array, weight_BV: jax.Array, wanted_B: jax.Array) -> jax.Array:
    """The smallest distance up to which the weights reach the given mass, (B,), so never less than the likeliest's."""
    bits_BV = lax.bitcast_convert_type(distance_BV, jnp.int32)  # of floats from 0 on: in the same order

    def halve(_, bounds):
        below_B, reach_B = bounds
        middle_B = below_B + (reach_B - below_B) // 2
        enough_B = jnp.where(bits_BV <= middle_B[:, None], weight_BV, 0).sum(axis=-1) >= wanted_B
        return jnp.where(enough_B, below_B, middle_B), jnp.where(enough_B, middle_B, reach_B)

    nothing_B = jnp.full(wanted_B.shape, -1, jnp.int32)
    _, reach_B = lax.fori_loop(0, 31, halve, (nothing_B, jnp.full_like(nothing_B, _INFINITE)))
    return lax.bitcast_convert_type(jnp.maximum(reach_B, 0), jnp.float32)


def draw(weight_BV: jax.Array, inputs: SamplerInputs, step_B: jax.Array) -> jax.Array:
    """Tokens drawn in proportion to their weights, (B,) int32, by each row's own random numbers."""
    keys_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(inputs.seed_B2, impl="threefry2x32"), step_B)
    chance_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    rows, vocab = weight_BV.shape
    blocks = math.ceil(vocab / _BLOCK)
    weight_BGM = jnp.pad(weight_BV, ((0, 0), (0, blocks * _BLOCK - vocab))).reshape(rows, blocks, _BLOCK)
    block_B = _first_beyond(weight_BGM.sum(axis=-1), chance_B2[:, 0])
    weight_BM = jnp.take_along_axis(weight_BGM, block_B[:, None, None], axis=1)[:, 0]
    return block_B * _BLOCK + _first_beyond(weight_BM, chance_B2[:, 1])


def _first_beyond(weight_BN: jax.Array, chance_B: jax.Array) -> jax.Array:
    """The first index with a weight at which the running sum exceeds that share of the whole, (B,) int32."""
    sum_BN = weight_BN.cumsum(axis=-1)
    beyond_BN = (sum_BN > chance_B[:, None] * sum_BN[:, -1:]) & (weight_BN > 0)
    # where rounding leaves none: the heaviest
    return jnp.where(beyond_BN.any(axis=-1), beyond_BN.argmax(axis=-1), weight_BN.argmax(axis=-1)).astype(jnp.int32)
