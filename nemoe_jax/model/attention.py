"""Grouped-query attention with RoPE, optional biases and QK-norm, and a key/value cache (kv_cache.py).

B batch, T new tokens, D embed, N heads, K kv heads, H head_dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from nemoe_jax.errors import UserError
from nemoe_jax.kernels.attention.dispatch import causal_attention
from nemoe_jax.kernels.fp8 import E4M3
from nemoe_jax.model.decode_weights import cache_scale
from nemoe_jax.model.kv_cache import LayerCache, update_and_attend
from nemoe_jax.model.layers import NO_ADAPTERS, Adapters, SpecModule, rms_norm
from nemoe_jax.model.rope import CosSin, rope, rope_cos_sin
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.mesh import batch_axes, sequence_axes, spans_devices
from nemoe_jax.spec.schema import Tree


class Context(NamedTuple):
    """Where the tokens of a call stand: the same for every layer but for the bias of a router."""

    positions_BT: jax.Array
    segments_BT: jax.Array | None  # packed documents: a token attends within its own segment alone
    cos_sin: CosSin | None = None  # of the positions, where all layers share it
    router_bias_E: jax.Array | None = None  # of the layer, while it trains with one: see moe.top_k_weights
    whole_groups: bool = False  # see moe.with_gradient_of_groups


class Attention(SpecModule):
    def __init__(self, config: ModelConfig, specs: Tree):
        super().__init__(specs)
        self.config, self.eps = config, config.norm_eps
        self.biased = config.attention_bias.removeprefix("none")

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LayerCache | None = None, adapters: Adapters = NO_ADAPTERS
    ) -> tuple[jax.Array, LayerCache | None]:
        """(B, T, D) -> (B, T, D) and the cache with the new keys and values in it."""
        q, k, v = self.queries_keys_values(x_BTD, context, adapters)
        if cache is None:
            y_BTNH = attend(q, k, v, context.segments_BT, self.config.sliding_window)
        else:
            scales = [cache_scale(self.weight(name)) for name in "kv"] if cache.k.pool.dtype == E4M3 else [None, None]
            q, k, v = _times(q, scales[0]), _divided(k, scales[0]), _divided(v, scales[1])
            y_BTNH, cache = update_and_attend(q, k, v, context.positions_BT, cache, self.config.sliding_window)
            y_BTNH = _times(y_BTNH, scales[1])
        return self._biased("o", self.project("o", y_BTNH, adapters)), cache

    def queries_keys_values(
        self, x_BTD: jax.Array, context: Context, adapters: Adapters = NO_ADAPTERS
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(B, T, N, H), and (B, T, K, H) twice, as the cache keeps them: with biases, QK-norm and RoPE."""
        q, k, v = (self._biased(name, self.project(name, x_BTD, adapters)) for name in "qkv")
        if self.config.qk_norm:
            q, k = self._normed("q_norm", q), self._normed("k_norm", k)
        cos_sin = context.cos_sin or rope_cos_sin(self.config, context.positions_BT)
        return rope(q, cos_sin), rope(k, cos_sin), v

    def _biased(self, name: str, y: jax.Array) -> jax.Array:
        return y + self.weight(f"{name}_bias").astype(y.dtype) if name in self.biased else y

    def _normed(self, name: str, x_BTNH: jax.Array) -> jax.Array:
        """RMSNorm of each head, or of all heads of a token together where the weight has both axes."""
        weight = self.weight(name)
        if weight.ndim == 1:
            return rms_norm(x_BTNH, weight, self.eps)
        whole = rms_norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1), weight.reshape(-1), self.eps)
        return whole.reshape(x_BTNH.shape)


def _times(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    return x if scale is None else (x * scale).astype(x.dtype)


def _divided(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    return x if scale is None else (x / scale).astype(x.dtype)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array | None, window: int | None = None
) -> jax.Array:
    """Causal attention of (B, T, N, H) queries over (B, T, K, H) keys and values, over the ambient mesh.

    Where the sequence is cut, two all-to-alls go from all heads of some tokens to some heads of all tokens, and back
    (Jacobs et al., 2023, DeepSpeed Ulysses). Keys and values are repeated where there are fewer than devices.

    Raises:
        UserError: the mesh's tensor and sequence axes do not divide the heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not spans_devices(mesh):
        return causal_attention(q, k, v, segments_BT, window)
    rows, tokens = batch_axes(mesh.shape, q.shape[0]), sequence_axes(mesh.shape, q.shape[1])
    tensor = ("tensor",) if mesh.shape.get("tensor", 1) > 1 else ()
    parts = math.prod(mesh.shape[name] for name in (*tensor, *tokens))
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % parts:
        shape = " × ".join(f"{name} {mesh.shape[name]}" for name in (*tensor, *tokens))
        raise UserError(f"attention: mesh {shape} does not divide {heads} heads")
    group = heads // kv_heads
    copies = next(copies for copies in range(1, group + 1) if group % copies == 0 and kv_heads * copies % parts == 0)
    if copies > 1:
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))

    def on_device(q, k, v, segments_BT):
        if not tokens:
            return causal_attention(q, k, v, segments_BT, window)
        q, k, v = (lax.all_to_all(x, "sequence", split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
        if segments_BT is not None:
            segments_BT = lax.all_gather(segments_BT, "sequence", axis=1, tiled=True)
        y = causal_attention(q, k, v, segments_BT, window)
        return lax.all_to_all(y, "sequence", split_axis=1, concat_axis=2, tiled=True)

    place = PartitionSpec(rows or None, tokens or None, tensor or None)
    of_tokens = PartitionSpec(rows or None, tokens or None)
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(place, place, place, of_tokens), out_specs=place, check_vma=False
    )(q, k, v, segments_BT)
