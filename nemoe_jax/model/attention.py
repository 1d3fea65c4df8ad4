"""Grouped-query attention with RoPE, optional QK-norm, and a key/value cache (cache.py).

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
from nemoe_jax.model.kv_cache import LayerCache, update_and_attend
from nemoe_jax.model.layers import NO_ADAPTERS, Adapters, SpecModule, rms_norm, rope, rope_cos_sin
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.mesh import batch_axes, sequence_axes
from nemoe_jax.spec.schema import Tree


class Context(NamedTuple):
    """Where the tokens of a call stand: the same for every layer."""

    positions_BT: jax.Array
    segments_BT: jax.Array | None  # packed documents: a token attends within its own segment alone
    turned: tuple[jax.Array, jax.Array] | None = None  # `rotation` of the positions, where all layers share it


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
        turned = context.turned or rope_cos_sin(context.positions_BT, q.shape[-1], self.theta)
        q, k = rope(q, turned), rope(k, turned)
        if cache is None:
            y_BTNH = attend(q, k, v, context.segments_BT)
        else:
            y_BTNH, cache = update_and_attend(q, k, v, context.positions_BT, cache)
        return self.project("o", y_BTNH, adapters), cache


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """Causal attention of (B, T, N, H) queries over (B, T, K, H) keys and values, over the ambient mesh.

    Where the sequence is cut, two all-to-alls go from all heads of some tokens to some heads of all tokens, and back
    (Jacobs et al., 2023, DeepSpeed Ulysses). Keys and values are repeated where there are fewer than devices.

    Raises:
        UserError: the mesh's tensor and sequence axes do not divide the heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return causal_attention(q, k, v, segments_BT)
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
            return causal_attention(q, k, v, segments_BT)
        q, k, v = (lax.all_to_all(x, "sequence", split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
        if segments_BT is not None:
            segments_BT = lax.all_gather(segments_BT, "sequence", axis=1, tiled=True)
        y = causal_attention(q, k, v, segments_BT)
        return lax.all_to_all(y, "sequence", split_axis=1, concat_axis=2, tiled=True)

    place = PartitionSpec(rows or None, tokens or None, tensor or None)
    of_tokens = PartitionSpec(rows or None, tokens or None)
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(place, place, place, of_tokens), out_specs=place, check_vma=False
    )(q, k, v, segments_BT)
