"""Weights that stay in FP8: a leaf of the parameters' tree, in the place of an array.

Attention's projections, dense FFNs and experts may be so; routers, the shared expert's gate, embedding, head and norms
stay as they are.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
from jax import lax
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.tree_util import register_dataclass

from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import ParamSpec, Tree, declare
from nemoe_jax.spec.sharding import fp8_scale_spec, shardings

_QUANTIZED = ("q", "k", "v", "o", "gate", "up", "down")
E4M3 = ml_dtypes.float8_e4m3fn
MAX = 448.0  # its largest finite value


def is_quantized(spec: ParamSpec) -> bool:
    """Whether an array is one of linear maps that may be in FP8."""
    return spec.transposed and spec.path.rpartition("/")[2] in _QUANTIZED


def widen(values: jax.Array) -> jax.Array:
    """float8_e4m3fn, or its bits, in float32: all but its NaN, which no weight is."""
    if values.dtype != jnp.uint8:
        return values.astype(jnp.float32)
    bits = values.astype(jnp.uint16)
    halves = lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)
    return halves.astype(jnp.float32) * 256  # exponents count from 15 there, and from 7 here


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """Linear maps in FP8: values · scale.

    values: (stacked…, inputs…, outputs…) in float8_e4m3fn; on CPU its bits, as uint8: XLA:CPU turns a whole stack of
        float8 into float16 before it slices it.
    scale: (stacked…, blocks, outputs…) in float32: the inputs, flattened, are in so many equal blocks, each with a
        scale for every output.
    cache_scale: (stacked…) in float32: what keys or values are divided by in a cache that is in FP8; None for 1.
    """

    values: Any
    scale: Any
    cache_scale: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        return E4M3

    @property
    def ndim(self) -> int:
        return self.values.ndim

    def matrices(self, stacked: int = 0) -> "Fp8Weight":
        """The same maps with their inputs flattened, and their outputs."""
        kept = self.values.shape[:stacked]
        scale = self.scale.reshape(*kept, self.scale.shape[stacked], -1)
        return Fp8Weight(self.values.reshape(*kept, -1, scale.shape[-1]), scale, self.cache_scale)

    def at(self, number: Any) -> "Fp8Weight":
        """One of those that are stacked."""
        return jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, number, keepdims=False), self)

    def dequantized(self, dtype: Any, stacked: int = 0) -> jax.Array:
        """values · scale."""
        flat = self.matrices(stacked)
        *kept, depth, width = flat.values.shape
        blocks = flat.scale.shape[-2]
        values = widen(flat.values.reshape(*kept, blocks, depth // blocks, width))
        return (values * flat.scale[..., None, :]).astype(dtype).reshape(self.values.shape)


def scale_shape(spec: ParamSpec, blocks: int = 1) -> tuple[int, ...]:
    """The shape of an array's scales."""
    stacked = len(spec.stacked)
    return (*spec.shape[:stacked], blocks, *spec.shape[stacked + len(spec.contracted) :])


def abstract_weight(spec: ParamSpec, place: Sharding, dtype: Any, fp8: bool) -> Any:
    """The shape, dtype and sharding of an array, or of its FP8 weights with a scale for each output."""
    if not (fp8 and is_quantized(spec)):
        return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype), sharding=place)
    of_scale = place
    if isinstance(place, NamedSharding):
        of_scale = NamedSharding(place.mesh, fp8_scale_spec(spec, place.spec, 1))
    scale = jax.ShapeDtypeStruct(scale_shape(spec), jnp.float32, sharding=of_scale)
    return Fp8Weight(jax.ShapeDtypeStruct(spec.shape, E4M3, sharding=place), scale)


def abstract_model(config: ModelConfig, dtype: Any, mesh: Mesh, fp8: bool = False) -> Tree:
    """The parameters' shapes, dtypes and shardings on a mesh, for a compiler; linear maps perhaps in FP8."""
    return jax.tree.map(
        lambda spec, place: abstract_weight(spec, place, dtype, fp8), declare(config), shardings(config, mesh)
    )


@jax.custom_vjp
def fake_quantize(w: jax.Array) -> jax.Array:
    """Linear maps (…, inputs, outputs) rounded to what FP8 holds of them, with a scale for each output.

    The gradient is that of the identity (Bengio et al., 2013: the straight-through estimator).
    """
    wide = w.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest / MAX, 1)
    return ((wide / scale).clip(-MAX, MAX).astype(E4M3).astype(jnp.float32) * scale).astype(w.dtype)


fake_quantize.defvjp(lambda w: (fake_quantize(w), None), lambda _, gradient: (gradient,))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeQuantized:
    """Weights that are trained, or that a trained adapter is over: used as FP8 will hold both together."""

    weight: Any  # an array or Fp8Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def with_adapter(self, adapter: Any, stacked: int, inputs: int, dtype: Any) -> "jax.Array | Fp8Weight":
        """The weights with the adapter's update in them, rounded, in a dtype; FP8 weights without one as they are.

        Args:
            stacked: 1 with an axis of experts, else 0.
            inputs: how many of the axes after it are contracted.
        """
        w = self.weight
        if isinstance(w, Fp8Weight):
            if adapter is None:
                return w
            w = w.dequantized(jnp.float32, stacked)
        shape = w.shape
        matrices = (*shape[:stacked], math.prod(shape[stacked : stacked + inputs]), -1)
        w = w.astype(jnp.float32).reshape(matrices)
        if adapter is not None:
            a = adapter.a.astype(jnp.float32).reshape(*matrices[:-1], adapter.a.shape[-1])
            b = adapter.b.astype(jnp.float32).reshape(*shape[:stacked], adapter.a.shape[-1], -1)
            w += adapter.scale * jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
        return fake_quantize(w).astype(dtype).reshape(shape)
