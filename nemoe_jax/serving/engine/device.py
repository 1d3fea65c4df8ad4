"""The compiled functions behind the model runner (runner.py), and what they keep on the device.

B slots of a step, T tokens of a chunk, M pages of a sequence, E stop tokens, V vocabulary, W words of 32 bits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemoe_jax.adapters.multi_lora import select_adapters
from nemoe_jax.inference.decode import DecodeState, Scores, read_only, verify
from nemoe_jax.inference.decode import decode as decode_steps
from nemoe_jax.inference.sampler import SamplerInputs, TokenCounts, scores
from nemoe_jax.kernels.attention.paged import KVPages
from nemoe_jax.model.kv_cache import KVCache, copy_page, shared_cache, zero_pages
from nemoe_jax.model.transformer import hidden_states, logits
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import Tree
from nemoe_jax.spec.sharding import constrain_tokens

MOST_ENDS = 16  # stop tokens of a slot on the device; more are found by the host, some steps later
_CHUNK = 32  # tokens whose logits are made at a time


class DeviceState(NamedTuple):
    """What stays on the device."""

    k: KVPages
    v: KVPages
    counts: TokenCounts


class Batch(NamedTuple):
    """The slots as the host wants them to be, in one int32 array: every array that a program gets costs time."""

    length_B: Any  # tokens that each slot holds in the cache
    next_B: Any  # the tokens that are read next
    step_B: Any  # tokens generated so far
    remaining_B: Any  # tokens that each slot may still generate; 0: it is idle
    adapter_B: Any  # the number of each slot's adapter; -1 for none
    stop_BE: Any  # tokens that end the response; -1 for none
    table_BM: Any

    @staticmethod
    def of(packed_BN: Any) -> "Batch":
        """The columns by name: NumPy's are views."""
        length_B, next_B, step_B, remaining_B, adapter_B = (packed_BN[:, column] for column in range(5))
        stop_BE, table_BM = packed_BN[:, 5 : 5 + MOST_ENDS], packed_BN[:, 5 + MOST_ENDS :]
        return Batch(length_B, next_B, step_B, remaining_B, adapter_B, stop_BE, table_BM)

    @staticmethod
    def idle(slots: int, pages: int) -> np.ndarray:
        """Idle slots with room for so many page numbers; for `of`."""
        packed_BN = np.zeros((slots, 5 + MOST_ENDS + pages), np.int32)
        packed_BN[:, 4 : 5 + MOST_ENDS] = -1
        return packed_BN


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def start(config: ModelConfig, slots: int, tokens: int, pages: int, dtype: Any) -> tuple[KVCache, TokenCounts]:
    return shared_cache(config, slots, tokens, pages, dtype), _laid(TokenCounts.empty(slots, config.vocab))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="held")
def prefill(
    config: ModelConfig,
    params: Tree,
    tokens_BT: Any,
    num_new_tokens_B: Any,
    held: DeviceState,
    table_BM: Any,
    length_B: Any,
    stacked: Tree | None,
    adapter_B: Any,
) -> tuple[DeviceState, jax.Array]:
    adapters = select_adapters(stacked, adapter_B) if stacked else None
    x_BTD, cache = read_only(
        config, params, tokens_BT, num_new_tokens_B, KVCache(held.k, held.v, table_BM, length_B), adapters
    )
    # where a token's keys or values are NaN, so is what comes of it in the end
    new_BT = jnp.arange(tokens_BT.shape[1]) < num_new_tokens_B[:, None]
    finite_B = (jnp.isfinite(x_BTD).all(axis=-1) | ~new_BT).all(axis=-1)
    return DeviceState(cache.k, cache.v, held.counts), finite_B


@functools.partial(jax.jit, static_argnames=("config", "top"))
def score(config: ModelConfig, params: Tree, tokens_T: Any, stacked: Tree | None, adapter_B: Any, top: int) -> Any:
    adapters = select_adapters(stacked, adapter_B) if stacked else None
    x_TD = hidden_states(config, params, tokens_T[None], adapters=adapters).x_BTD[0]

    def chunk(given):
        x_CD, target_C = given
        return scores(logits(config, params, x_CD[None], adapters)[0], target_C, top)

    chunks = (-1, _CHUNK)  # the logits of all tokens at once would take gigabytes
    target_T = jnp.roll(tokens_T, -1)
    scored = jax.lax.map(chunk, (x_TD.reshape(*chunks, x_TD.shape[-1]), target_T.reshape(chunks)))
    return [array.reshape(-1, *array.shape[2:]) for array in scored]


@functools.partial(jax.jit, donate_argnames="held")
def count(held: DeviceState, forgotten_B: Any, tokens_BT: Any, num_new_tokens_B: Any) -> DeviceState:
    return held._replace(counts=_laid(held.counts.forget(forgotten_B).add_prompt(tokens_BT, num_new_tokens_B)))


@functools.partial(jax.jit, static_argnames=("config", "top"), donate_argnames="held")
def decode(
    config: ModelConfig,
    params: Tree,
    held: DeviceState,
    packed_BN: Any,
    slot_B: Any | None,
    steps: Any,
    controls: SamplerInputs,
    allowed_BW: Any | None,
    stacked: Tree | None,
    guesses: tuple[Any, Any] | None,
    top: int | None,
) -> tuple[DeviceState, jax.Array, Scores | None]:
    """The state, and what came in one array, as every array that goes to the host costs time.

    packed_BN: see `Batch`.
    (3 + S, B) int32: steps, tokens generated, whether it failed, tokens.
    """
    batch = Batch.of(packed_BN)
    cache = KVCache(held.k, held.v, batch.table_BM, batch.length_B)
    penalized = controls.repetition_B is not None  # a slot with a penalty has it from its first token to its last
    counts = held.counts if penalized else None
    if counts is not None and slot_B is not None:
        counts = TokenCounts(*(array_BV.at[slot_B].get(mode="fill", fill_value=0) for array_BV in counts))
    state = DecodeState(cache, counts, batch.next_B, batch.step_B, batch.remaining_B, batch.stop_BE)
    adapters = select_adapters(stacked, batch.adapter_B) if stacked else None
    if guesses is None:
        given: dict[str, Any] = {"adapters": adapters, "allowed_BW": allowed_BW, "top": top}
        state, block = decode_steps(config, params, state, steps, controls, **given)
    else:
        state, block = verify(config, params, state, *guesses, controls, adapters=adapters)
    about_3B = (jnp.broadcast_to(block.steps, block.num_generated_B.shape), block.num_generated_B, block.failed_B)
    packed = jnp.concatenate([jnp.stack(about_3B).astype(jnp.int32), block.tokens_SB])
    if state.counts is None:
        return DeviceState(state.cache.k, state.cache.v, held.counts), packed, block.scores
    counts = state.counts
    if slot_B is not None:  # the idle places' are beyond the slots
        pairs = zip(held.counts, counts, strict=True)
        counts = TokenCounts(*(whole_BV.at[slot_B].set(array_BV, mode="drop") for whole_BV, array_BV in pairs))
    return DeviceState(state.cache.k, state.cache.v, _laid(counts)), packed, block.scores


@functools.partial(jax.jit, donate_argnames="held")
def wipe(held: DeviceState, pages_M: Any, here_B: Any) -> DeviceState:
    k, v = zero_pages((held.k, held.v), pages_M, here_B)
    return held._replace(k=k, v=v)


@functools.partial(jax.jit, donate_argnames="held")
def copy(held: DeviceState, source: Any, target: Any, here_B: Any) -> DeviceState:
    k, v = copy_page((held.k, held.v), source, target, here_B)
    return held._replace(k=k, v=v)


def _laid(counts: TokenCounts) -> TokenCounts:
    return TokenCounts(*map(constrain_tokens, counts))
