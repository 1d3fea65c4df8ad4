"""Grouped-query attention with RoPE, optional QK-norm, and a key/value cache.

The cache holds one slot per position; a query at position p sees the slots 0 to p, so slots that were filled beyond a
row's true length (a right-padded prompt) are never seen and are overwritten as the row grows.

B batch, T new tokens, S keys (cache slots), D embed, N heads, K kv heads, H head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nemoe_jax.config import ModelConfig
from nemoe_jax.layers import NO_ADAPTERS, Adapters, SpecModule, rms_norm, rope
from nemoe_jax.schema import Tree


class LayerCache(NamedTuple):
    """Keys and values of one layer, (B, S, K, H), or of a run of layers, stacked on a first axis."""

    k: jax.Array
    v: jax.Array


class Context(NamedTuple):
    """Where the tokens of a call stand: the same for every layer."""

    positions_BT: jax.Array
    segments_BT: jax.Array | None  # packed documents: a token attends within its own segment alone
    start_B: jax.Array | None  # with a cache: the slot that a row's first new token is written to


class Attention(SpecModule):
    def __init__(self, config: ModelConfig, specs: Tree):
        super().__init__(specs)
        self.theta, self.eps, self.qk_norm = config.rope_theta, config.norm_eps, config.qk_norm

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LayerCache | None = None, adapters: Adapters = NO_ADAPTERS
    ) -> tuple[jax.Array, LayerCache | None]:
        """(B, T, D) -> (B, T, D) and the cache with the new keys and values in it."""
        q = self.project("q", x_BTD, adapters)
        k = self.project("k", x_BTD, adapters)
        v = self.project("v", x_BTD, adapters)
        if self.qk_norm:
            q, k = rms_norm(q, self.weight("q_norm"), self.eps), rms_norm(k, self.weight("k_norm"), self.eps)
        q, k = rope(q, context.positions_BT, self.theta), rope(k, context.positions_BT, self.theta)
        if cache is not None and context.start_B is not None:
            cache = LayerCache(_write(cache.k, k, context.start_B), _write(cache.v, v, context.start_B))
            k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        y_BTNH = attend(q, k, v, context, cached=cache is not None)
        return self.project("o", y_BTNH, adapters), cache


def attend(q: jax.Array, k: jax.Array, v: jax.Array, context: Context, cached: bool) -> jax.Array:
    """Causal attention of (B, T, N, H) queries over (B, S, K, H) keys and values; softmax in float32."""
    mask = None
    if cached:
        slots_S = jnp.arange(k.shape[1])
        mask = (slots_S <= context.positions_BT[..., None])[:, None]
    elif context.segments_BT is not None:
        mask = (context.segments_BT[:, :, None] == context.segments_BT[:, None])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=not cached)


def _write(slots_BSKH: jax.Array, new_BTKH: jax.Array, start_B: jax.Array) -> jax.Array:
    """Each row's new entries at its own first slot."""
    return jax.vmap(lambda slots, new, start: jax.lax.dynamic_update_slice_in_dim(slots, new, start, 0))(
        slots_BSKH, new_BTKH.astype(slots_BSKH.dtype), start_B
    )
