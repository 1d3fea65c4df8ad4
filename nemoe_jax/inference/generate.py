"""Text generation: prompts are read in chunks, then tokens are decoded in blocks, one compiled loop each.

B batch, T tokens of a chunk, V vocabulary, S tokens of a block; E stop tokens.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nemoe_jax.errors import UserError
from nemoe_jax.inference.decode import (
    BLOCK,
    NOT_A_NUMBER,
    DecodedTokens,
    DecodeState,
    decode,
    has_penalty,
    no_steps,
    prefill,
    take,
)
from nemoe_jax.inference.sampler import SamplerInputs, TokenCounts, controls, specialized
from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.kernels.attention.paged import PAGE
from nemoe_jax.kernels.backend import target_platform
from nemoe_jax.model.decode_weights import prepare_decode_params
from nemoe_jax.model.kv_cache import empty_cache
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.mesh import use_mesh
from nemoe_jax.spec.schema import Tree

PREFILL = 2048  # tokens of a prompt that are read at a time: bounds memory, and gives every expert many rows
GREEDY = SamplingParams()
CACHE_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int8")


def cache_dtype_of(params: Tree, name: str | None) -> Any:
    """The dtype of keys and values: as named, or the model's own. Raises UserError where there is none of that name."""
    if name not in (None, *CACHE_DTYPES):
        raise UserError(f"cache dtype: expected one of {', '.join(CACHE_DTYPES)}, got {name!r}")
    return jnp.dtype(name or params["embed"].dtype)


def generate(
    config: ModelConfig,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
    stop: Sequence[int] = (),
    mesh: Mesh | None = None,
    cache_dtype: str | None = None,
    known_V: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yields the batch's next tokens, (B,) int32, up to `max_new_tokens` times.

    A row that has given a stop token goes on giving it; the iterator ends when every row has.

    Args:
        sampling: of all rows, of which row b draws by the seed `sampling.seed + b`; or of each row.
        cache_dtype: one of `CACHE_DTYPES`, or None for the model's own.
        known_V: which embedding rows stand for a token, bool; the others are never chosen. None: all do.

    Raises:
        UserError: an empty prompt, prompt + new tokens beyond the model's context, an unknown dtype, a bias for a token
            that the model lacks, logits that are no numbers.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths_B.size or lengths_B.min() < 1:
        raise UserError("empty prompt: expected at least one token")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: expected a positive number, got {max_new_tokens}")
    if lengths_B.max() + max_new_tokens > config.context:
        raise UserError(
            f"prompt of {lengths_B.max()} tokens + {max_new_tokens} new tokens exceed the context of {config.context}"
        )
    dtype = cache_dtype_of(params, cache_dtype)
    slots = tuple(min(-(-(int(length) + max_new_tokens) // PAGE) * PAGE, config.context) for length in lengths_B)
    if isinstance(sampling, SamplingParams):
        sampling = [dataclasses.replace(sampling, seed=(sampling.seed + slot) % 2**64) for slot in range(len(prompts))]
    inputs = specialized(controls(sampling, config.vocab, known_V))
    # the caller's own mesh is not to change while he has the iterator
    ambient = functools.partial(use_mesh, mesh)
    with ambient():
        penalties, stop_E = any(map(has_penalty, sampling)), np.array([*stop, -1], np.int32)
        state, logits_BV = _start(config, slots, dtype, penalties, max_new_tokens, stop_E)
        for tokens_BT, num_new_tokens_B in _chunks(prompts, lengths_B):
            state, logits_BV = _prefill(config, params, tokens_BT, num_new_tokens_B, state, logits_BV)
        state, block = _first(state, logits_BV, inputs)
        params = prepare_decode_params(params, len(prompts))
        # the device works on one block while the one before it is read; but on CPU what waits would hold a thread
        ahead = 1 if target_platform() == "cpu" else 2
    yield from _tokens(block)
    under_way: deque[DecodedTokens] = deque()
    size, left = 1, max_new_tokens - 1
    while left or under_way:
        if left:
            steps = min(size, left)
            with ambient():
                state, block = _decode(config, params, state, steps, inputs)
            under_way.append(block)
            size, left = min(2 * size, BLOCK), left - steps
        if len(under_way) == ahead or not left:
            tokens_SB = _tokens(under_way.popleft())
            if not len(tokens_SB):
                return
            yield from tokens_SB


def _tokens(block: DecodedTokens) -> np.ndarray:
    """A block's tokens (S, B). Raises UserError where the logits were no numbers."""
    if np.any(block.failed_B):
        raise UserError(NOT_A_NUMBER)
    return np.asarray(block.tokens_SB)[: int(block.steps)]


def _chunks(prompts: Sequence[Sequence[int]], lengths_B: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The prompts in chunks of equal width, (B, T), and how many tokens of each row count, (B,)."""
    longest = int(lengths_B.max())
    width = _rounded(-(-longest // -(-longest // PREFILL)))
    for first in range(0, longest, width):
        tokens_BT = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(tokens_BT, prompts, strict=True):
            part = prompt[first : first + width]
            row[: len(part)] = part
        yield tokens_BT, np.clip(lengths_B - first, 0, width)


def _rounded(length: int) -> int:
    """Lengths in steps of 32, so that few shapes are compiled."""
    return -(-length // 32) * 32


@functools.partial(jax.jit, static_argnames=("config", "slots", "dtype", "counted"))
def _start(
    config: ModelConfig, slots: tuple[int, ...], dtype: Any, counted: bool, max_new_tokens: Any, stop_E: Any
) -> tuple[DecodeState, jax.Array]:
    batch = len(slots)
    cache, zeros_B = empty_cache(config, batch, slots, dtype), jnp.zeros(batch, jnp.int32)
    counts = TokenCounts.empty(batch, config.vocab) if counted else None
    stop_BE = jnp.broadcast_to(stop_E, (batch, len(stop_E)))
    state = DecodeState(cache, counts, zeros_B, zeros_B, zeros_B + max_new_tokens, stop_BE)
    return state, jnp.zeros((batch, config.vocab), jnp.float32)


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("state", "logits_BV"))
def _prefill(
    config: ModelConfig, params: Tree, tokens_BT: Any, num_new_tokens_B: Any, state: DecodeState, logits_BV: jax.Array
) -> tuple[DecodeState, jax.Array]:
    """A chunk of the prompts, and the logits behind each prompt so far: those of a row that ended before stay."""
    new_BV, cache = prefill(config, params, tokens_BT, num_new_tokens_B, state.cache)
    counts = state.counts
    if counts is not None:
        counts = counts.add_prompt(tokens_BT, num_new_tokens_B)
    return state._replace(cache=cache, counts=counts), jnp.where(num_new_tokens_B[:, None] > 0, new_BV, logits_BV)


@functools.partial(jax.jit, donate_argnames="state")
def _first(state: DecodeState, logits_BV: jax.Array, inputs: SamplerInputs) -> tuple[DecodeState, DecodedTokens]:
    return take(logits_BV, state, no_steps(state, None), inputs)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _decode(
    config: ModelConfig, params: Tree, state: DecodeState, steps: Any, inputs: SamplerInputs
) -> tuple[DecodeState, DecodedTokens]:
    return decode(config, params, state, steps, inputs)
