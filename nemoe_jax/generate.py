"""Text generation: prefill a batch of prompts, then decode one token at a time with the cache.

B batch, T prompt length, V vocabulary.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nemoe_jax.config import ModelConfig
from nemoe_jax.errors import UserError
from nemoe_jax.schema import Tree
from nemoe_jax.transformer import Cache, empty_cache, forward


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
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.min_p > 0:
        floor = logits_BV.max(axis=-1, keepdims=True) + np.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV < floor, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


def generate(
    config: ModelConfig,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Sequence[int] = (),
    mesh: Mesh | None = None,
) -> Iterator[np.ndarray]:
    """Yields the batch's next tokens, (B,) int32, up to `max_new_tokens` times.

    A row that has given a stop token goes on giving it; the iterator ends when every row has.

    Raises:
        UserError: an empty prompt, or prompt + new tokens beyond the model's context.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths_B.size or lengths_B.min() < 1:
        raise UserError("empty prompt: wanted at least one token")
    if lengths_B.max() + max_new_tokens > config.context:
        raise UserError(
            f"prompt of {lengths_B.max()} tokens + {max_new_tokens} new tokens exceed the context of {config.context}"
        )
    width = _rounded(int(lengths_B.max()))
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = empty_cache(config, len(prompts), width + _rounded(max_new_tokens), params["embed"].dtype)
    stopped_B = np.zeros(len(prompts), bool)
    key = jax.random.key(sampling.seed)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        next_B, cache = _prefill(config, params, tokens_BT, lengths_B, cache, sampling, key)
        for step in range(1, max_new_tokens + 1):
            # the next step is under way on the device before this one's tokens are read
            following = None
            if step < max_new_tokens:
                following = _decode(config, params, next_B, cache, sampling, jax.random.fold_in(key, step))
            tokens_B = np.asarray(next_B)
            yield tokens_B
            stopped_B |= np.isin(tokens_B, stop)
            if following is None or stopped_B.all():
                return
            next_B, cache = following


def _rounded(length: int) -> int:
    """Lengths in steps of 64, so that few shapes are compiled."""
    return -(-length // 64) * 64


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames="cache")
def _prefill(
    config: ModelConfig, params: Tree, tokens_BT: Any, lengths_B: Any, cache: Cache, sampling: Sampling, key: jax.Array
) -> tuple[jax.Array, Cache]:
    output = forward(config, params, tokens_BT, cache=cache)
    last_BV = jnp.take_along_axis(output.logits, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    assert output.cache is not None
    # what the padding wrote lies beyond each row's length: unseen, and overwritten as the row grows
    return sample(last_BV, sampling, key), output.cache._replace(length_B=lengths_B)


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames="cache")
def _decode(
    config: ModelConfig, params: Tree, tokens_B: jax.Array, cache: Cache, sampling: Sampling, key: jax.Array
) -> tuple[jax.Array, Cache]:
    output = forward(config, params, tokens_B[:, None], cache=cache)
    assert output.cache is not None
    return sample(output.logits[:, 0], sampling, key), output.cache
