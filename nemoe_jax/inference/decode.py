"""The steps of decoding on the device: what `generate` and the serving engine have in common.

A slot is active while `remaining_B > 0`: a stop token, NaN logits or the last token asked for end it, and from then on
it costs little but its place. The token sampled last is not in the cache yet: the next step reads it.

B batch, T tokens of a chunk, D embed, V vocabulary, S tokens of a block, E stop tokens, N likeliest tokens, W words of
32 bits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nemoe_jax.inference.sampler import SamplerInputs, TokenCounts, sample, scores
from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.model.kv_cache import KVCache
from nemoe_jax.model.transformer import hidden_states, logits
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import Tree

BLOCK = 32  # tokens that are decoded without a word from the host
NOT_A_NUMBER = "the model's logits are no numbers (NaN): its weights are damaged, or its dtype's range is too small"


class DecodeState(NamedTuple):
    """What a batch needs to go on; the cache and the counts stay on the device."""

    cache: KVCache
    counts: TokenCounts | None  # None where no row has a penalty
    next_B: Any  # int32: the tokens chosen last, or the last ones of the prompts
    step_B: Any  # int32: tokens chosen so far
    remaining_B: Any  # int32: tokens that each row may still have; 0: it rests
    stop_BE: Any  # int32: tokens that end the row; -1 for none


def has_penalty(sampling: SamplingParams) -> bool:
    """Whether the choice depends on what the prompt and the answer hold."""
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0)


class Scores(NamedTuple):
    """The model's own log-probabilities of the chosen tokens, and the likeliest tokens with theirs."""

    logprob_SB: jax.Array
    tokens_SBN: jax.Array
    logprobs_SBN: jax.Array


class DecodedTokens(NamedTuple):
    """What some steps gave."""

    steps: jax.Array  # fewer than were asked for where every row rests
    tokens_SB: jax.Array  # a row that rests gives its last token again
    num_generated_B: jax.Array  # how many of them are the row's own, the first ones
    failed_B: jax.Array  # bool: the row ended as its logits are no numbers, or no token is allowed
    scores: Scores | None


def prefill(
    config: ModelConfig,
    params: Tree,
    tokens_BT: Any,
    num_new_tokens_B: Any,
    cache: KVCache,
    adapters: Tree | None = None,
) -> tuple[jax.Array, KVCache]:
    """Adds tokens to the cache. The logits (B, V) behind each row's last token that counts, and the cache."""
    x_BTD, cache = read_only(config, params, tokens_BT, num_new_tokens_B, cache, adapters)
    if tokens_BT.shape[1] > 1:
        x_BTD = jnp.take_along_axis(x_BTD, jnp.maximum(num_new_tokens_B - 1, 0)[:, None, None], axis=1)
    return logits(config, params, x_BTD, adapters, decoding=True)[:, 0], cache


def read_only(
    config: ModelConfig,
    params: Tree,
    tokens_BT: Any,
    num_new_tokens_B: Any,
    cache: KVCache,
    adapters: Tree | None = None,
) -> tuple[jax.Array, KVCache]:
    """`read` without the head: the hidden states (B, T, D)."""
    output = hidden_states(config, params, tokens_BT, adapters=adapters, cache=cache, num_new_tokens_B=num_new_tokens_B)
    assert output.cache is not None
    return output.x_BTD, output.cache


def decode(
    config: ModelConfig,
    params: Tree,
    state: DecodeState,
    steps: Any,
    controls: SamplerInputs,
    *,
    adapters: Tree | None = None,
    allowed_BW: Any | None = None,
    top: int | None = None,
) -> tuple[DecodeState, DecodedTokens]:
    """Up to `steps` tokens of each row, at most `BLOCK`; jit it, with `config` and `top` closed over.

    Args:
        params: as `prepare_decode_params` gives them.
        adapters: LoRA adapters (lora.py).
        allowed_BW: bits of the tokens that may come next (see `choose`); then one step is all that makes sense.
        top: how many of the likeliest tokens get log-probabilities; None: of no token at all.
    """

    def step(carry):
        state, block = carry
        working_B = (state.remaining_B > 0).astype(jnp.int32)
        logits_BV, cache = prefill(config, params, state.next_B[:, None], working_B, state.cache, adapters)
        return take(logits_BV, state._replace(cache=cache), block, controls, allowed_BW)

    state = DecodeState(*jax.tree.map(jnp.asarray, tuple(state)))
    return jax.lax.while_loop(
        lambda carry: (carry[1].steps < steps) & (carry[0].remaining_B > 0).any(), step, (state, no_steps(state, top))
    )


def verify(
    config: ModelConfig,
    params: Tree,
    state: DecodeState,
    guess_BK: Any,
    num_guesses_B: Any,
    controls: SamplerInputs,
    *,
    adapters: Tree | None = None,
) -> tuple[DecodeState, DecodedTokens]:
    """The tokens that `decode` would give, as many as one forward pass over guessed tokens can tell: 1 to K + 1.

    A position samples its token as ever; what lies behind the first one that was not guessed says nothing, and is
    overwritten in the cache by what comes next.

    Args:
        guess_BK: what may follow `next_B`; the first `num_guesses_B` of them count, fewer than each row may still have.
    """
    state = DecodeState(*jax.tree.map(jnp.asarray, tuple(state)))
    guess_BK, num_guesses_B = jnp.asarray(guess_BK), jnp.asarray(num_guesses_B)
    length_B, active_B = state.cache.length_B, state.remaining_B > 0
    tokens_BT = jnp.concatenate([state.next_B[:, None], guess_BK], axis=1)
    num_new_tokens_B = jnp.where(active_B, 1 + num_guesses_B, 0)
    x_BTD, cache = read_only(config, params, tokens_BT, num_new_tokens_B, state.cache, adapters)
    logits_BTV = logits(config, params, x_BTD, adapters, decoding=True)
    following_BT = jnp.pad(guess_BK, ((0, 0), (0, 1)), constant_values=-1)

    def step(carry):
        state, block, right_B = carry
        at = block.steps
        own = state._replace(remaining_B=jnp.where(right_B, state.remaining_B, 0))
        new, block = take(logits_BTV[:, at], own, block, controls)
        right_B &= (new.remaining_B > 0) & (at < num_guesses_B) & (new.next_B == following_BT[:, at])
        remaining_B = jnp.where(own.remaining_B > 0, new.remaining_B, state.remaining_B)
        return new._replace(remaining_B=remaining_B), block, right_B

    carry = (state._replace(cache=cache), no_steps(state, None), active_B)
    state, block, _ = jax.lax.while_loop(lambda carry: carry[2].any(), step, carry)
    return state._replace(cache=cache._replace(length_B=length_B + block.num_generated_B)), block


def take(
    logits_BV: jax.Array,
    state: DecodeState,
    block: DecodedTokens,
    controls: SamplerInputs,
    allowed_BW: Any | None = None,
) -> tuple[DecodeState, DecodedTokens]:
    """The next token of each row that is at work, as the last one of the block."""
    working_B = state.remaining_B > 0
    token_B = sample(logits_BV, controls, state.counts, state.step_B, allowed_BW)
    chosen_B = working_B & (token_B >= 0)
    next_B = jnp.where(chosen_B, token_B, state.next_B)
    ended_B = (next_B[:, None] == state.stop_BE).any(axis=1)
    given = block.scores
    if given is not None:
        arrays = scores(logits_BV, next_B, given.tokens_SBN.shape[2])
        given = Scores(*(into.at[block.steps].set(new) for into, new in zip(given, arrays, strict=True)))
    block = DecodedTokens(
        block.steps + 1,
        block.tokens_SB.at[block.steps].set(next_B),
        block.num_generated_B + chosen_B,
        block.failed_B | (working_B & ~chosen_B),
        given,
    )
    counts = None if state.counts is None else state.counts.add(next_B, chosen_B)
    remaining_B = jnp.where(chosen_B & ~ended_B, state.remaining_B - 1, 0)
    return DecodeState(state.cache, counts, next_B, state.step_B + chosen_B, remaining_B, state.stop_BE), block


def no_steps(state: DecodeState, top: int | None) -> DecodedTokens:
    """A block of no steps."""
    batch = len(state.next_B)
    tokens_SB, zeros_B = jnp.zeros((BLOCK, batch), jnp.int32), jnp.zeros(batch, jnp.int32)
    given = None
    if top is not None:
        given = Scores(
            jnp.zeros((BLOCK, batch)), jnp.zeros((BLOCK, batch, top), jnp.int32), jnp.zeros((BLOCK, batch, top))
        )
    return DecodedTokens(jnp.int32(0), tokens_SB, zeros_B, zeros_B > 0, given)
