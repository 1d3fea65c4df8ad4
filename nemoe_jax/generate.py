"""Text generation: prompts are read in chunks, then tokens are decoded in blocks, one compiled loop each.

B batch, T tokens of a chunk, V vocabulary, S tokens of a block; stop tokens, too.
"""

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nemoe_jax.cache import PAGE, Cache, empty_cache
from nemoe_jax.config import ModelConfig
from nemoe_jax.errors import UserError
from nemoe_jax.platform import platform
from nemoe_jax.schema import Tree
from nemoe_jax.stacked import for_decoding
from nemoe_jax.transformer import forward, hidden, logits

BLOCK = 32  # tokens that are decoded without a word from the host
PREFILL = 2048  # tokens of a prompt that are read at a time: bounds memory, and gives every expert many rows
CACHE_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int8")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits."""

    temperature: float = 0.0  # 0 is greedy
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest (Nguyen et al., 2024)
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise UserError(f"temperature: wanted 0 or more, got {self.temperature}")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p: wanted 0 to below 1, got {self.min_p}")


def sample(logits_BV: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """One token for each row, (B,) int32."""
    if sampling.temperature == 0:
        return _likeliest(logits_BV)
    logits_BV = logits_BV / sampling.temperature
    if sampling.min_p > 0:
        floor = logits_BV.max(axis=-1, keepdims=True) + np.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV < floor, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


class _State(NamedTuple):
    """What a batch needs to go on; all of it stays on the device."""

    cache: Cache
    next_B: jax.Array  # the tokens chosen last, which are not in the cache yet
    stopped_B: jax.Array
    step: jax.Array  # tokens chosen so far


def _likeliest(logits_BV: jax.Array) -> jax.Array:
    """The first of the largest logits in each row: `argmax` in two passes, which on CPU are eight times as fast."""
    vocab = logits_BV.shape[-1]
    token_BV = jnp.where(logits_BV == logits_BV.max(axis=-1, keepdims=True), jnp.arange(vocab, dtype=jnp.int32), vocab)
    return jnp.minimum(token_BV.min(axis=-1), vocab - 1)  # a row of NaN is equal to nothing


def generate(
    config: ModelConfig,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Sequence[int] = (),
    mesh: Mesh | None = None,
    cache_dtype: str | None = None,
) -> Iterator[np.ndarray]:
    """Yields the batch's next tokens, (B,) int32, up to `max_new_tokens` times.

    A row that has given a stop token goes on giving it; the iterator ends when every row has.

    Args:
        cache_dtype: one of `CACHE_DTYPES`, or None for the model's own.

    Raises:
        UserError: an empty prompt, prompt + new tokens beyond the model's context, an unknown dtype.
    """
    if cache_dtype not in (None, *CACHE_DTYPES):
        raise UserError(f"cache dtype: wanted one of {', '.join(CACHE_DTYPES)}, got {cache_dtype!r}")
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths_B.size or lengths_B.min() < 1:
        raise UserError("empty prompt: wanted at least one token")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: wanted a positive number, got {max_new_tokens}")
    if lengths_B.max() + max_new_tokens > config.context:
        raise UserError(
            f"prompt of {lengths_B.max()} tokens + {max_new_tokens} new tokens exceed the context of {config.context}"
        )
    dtype = jnp.dtype(cache_dtype or params["embed"].dtype)
    slots = tuple(min(-(-(int(length) + max_new_tokens) // PAGE) * PAGE, config.context) for length in lengths_B)
    stop_S = np.array([*stop, -1], np.int32)  # never empty
    key = jax.random.key(sampling.seed)
    # the caller's own mesh is not to change while he has the iterator
    ambient = functools.partial(jax.set_mesh, mesh) if mesh else contextlib.nullcontext
    with ambient():
        state = _start(config, slots, dtype)
        for tokens_BT, counts_B in _chunks(prompts, lengths_B):
            state = _prefill(config, params, tokens_BT, counts_B, state, sampling, stop_S, key)
        first_B = np.array(state.next_B)
        params = for_decoding(params, len(prompts))
        # the device works on one block while the one before it is read; but on CPU what waits would hold a thread
        ahead = 1 if platform() == "cpu" else 2
    yield first_B
    under_way: deque[tuple[jax.Array, jax.Array]] = deque()
    size, left = 1, max_new_tokens - 1
    while left or under_way:
        if left:
            steps = min(size, left)
            with ambient():
                state, block = _decode(config, params, state, steps, sampling, stop_S, key)
            under_way.append(block)
            size, left = min(2 * size, BLOCK), left - steps
        if len(under_way) == ahead or not left:
            tokens_SB, made = under_way.popleft()
            if not int(made):
                return
            yield from np.asarray(tokens_SB)[: int(made)]


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


@functools.partial(jax.jit, static_argnames=("config", "slots", "dtype"))
def _start(config: ModelConfig, slots: tuple[int, ...], dtype: Any) -> _State:
    tokens_B = jnp.zeros(len(slots), jnp.int32)
    return _State(empty_cache(config, len(slots), slots, dtype), tokens_B, tokens_B > 0, jnp.int32(0))


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames="state")
def _prefill(
    config: ModelConfig,
    params: Tree,
    tokens_BT: Any,
    counts_B: Any,
    state: _State,
    sampling: Sampling,
    stop_S: Any,
    key: jax.Array,
) -> _State:
    """A chunk of the prompts; the rows whose prompt ends in it choose their first token."""
    output = hidden(config, params, tokens_BT, cache=state.cache, counts_B=counts_B)
    assert output.cache is not None
    last_B11 = jnp.maximum(counts_B - 1, 0)[:, None, None]
    logits_B1V = logits(config, params, jnp.take_along_axis(output.x_BTD, last_B11, axis=1))
    # a row that ended before keeps its token
    next_B = jnp.where(counts_B > 0, sample(logits_B1V[:, 0], sampling, key), state.next_B)
    return _State(output.cache, next_B, jnp.isin(next_B, stop_S), jnp.int32(1))


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames="state")
def _decode(
    config: ModelConfig, params: Tree, state: _State, steps: int, sampling: Sampling, stop_S: Any, key: jax.Array
) -> tuple[_State, tuple[jax.Array, jax.Array]]:
    """Up to `steps` tokens, (BLOCK, B), and how many they are: fewer where every row has stopped."""

    def step(carry):
        made, tokens_SB, state = carry
        counts_B = 1 - state.stopped_B.astype(jnp.int32)
        output = forward(config, params, state.next_B[:, None], cache=state.cache, counts_B=counts_B)
        assert output.cache is not None
        next_B = sample(output.logits[:, 0], sampling, jax.random.fold_in(key, state.step))
        next_B = jnp.where(state.stopped_B, state.next_B, next_B)
        state = _State(output.cache, next_B, state.stopped_B | jnp.isin(next_B, stop_S), state.step + 1)
        return made + 1, tokens_SB.at[made].set(next_B), state

    nothing = jnp.zeros((BLOCK, len(state.next_B)), jnp.int32)
    made, tokens_SB, state = jax.lax.while_loop(
        lambda carry: (carry[0] < steps) & ~carry[2].stopped_B.all(), step, (jnp.int32(0), nothing, state)
    )
    return state, (tokens_SB, made)
