"""Weights that stay in 8 or 4 bits: a leaf of the parameters' tree, in the place of an array.

FP8 is float8_e4m3fn with a scale for each output, or for each of its blocks of inputs. NF4 is a number of 16 values in
[-1, 1], the quantiles of a normal distribution, times the largest magnitude of a block of at most 64 inputs of an
output (Dettmers et al., 2023, arXiv 2305.14314, appendix E): it is for weights that are frozen under adapters.

Attention's projections, dense FFNs and experts may be so; routers, the shared expert's gate, embedding, head and norms
stay as they are.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal

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
Quantization = Literal["fp8", "nf4"]
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NF4_BLOCK = 64


def is_quantized(spec: ParamSpec) -> bool:
    """Whether an array is one of linear maps that may be in FP8."""
    return spec.transposed and spec.path.rpartition("/")[2] in _QUANTIZED


def widen(values: jax.Array) -> jax.Array:
    """In float32: float8_e4m3fn, or its bits, all but its NaN, which no weight is; or what uint4 stands for in NF4."""
    if values.dtype == jnp.uint4:
        return lax.platform_dependent(values.astype(jnp.int32), tpu=_select_nf4, default=_look_up_nf4)
    if values.dtype != jnp.uint8:
        return values.astype(jnp.float32)
    bits = values.astype(jnp.uint16)
    halves = lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)
    return halves.astype(jnp.float32) * 256  # exponents count from 15 there, and from 7 here


def _look_up_nf4(code: jax.Array) -> jax.Array:
    return jnp.array(NF4, jnp.float32).at[code].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _select_nf4(code: jax.Array) -> jax.Array:
    """For TPUs, where a look-up goes element by element. On GPUs XLA keeps an array of each value beside a loop."""
    wide = jnp.full(code.shape, NF4[0], jnp.float32)
    for number, value in enumerate(NF4[1:], 1):
        wide = jnp.where(code == number, jnp.float32(value), wide)
    return wide


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """Linear maps in FP8 or NF4: values · scale.

    values: (stacked…, inputs…, outputs…) in float8_e4m3fn; on CPU its bits, as uint8: XLA:CPU turns a whole stack of
        float8 into float16 before it slices it. In NF4 uint4, numbers of `NF4`.
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
        return E4M3 if self.is_fp8 else self.values.dtype

    @property
    def is_fp8(self) -> bool:
        """Whether hardware that multiplies in FP8 can multiply with it."""
        return self.values.dtype != jnp.uint4

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


def nf4_block(spec: ParamSpec, place: Sharding) -> int:
    """Inputs of a block: as many of an array's as go into 64, and into each device's part of them."""
    stacked = len(spec.stacked)
    inputs = place.shard_shape(spec.shape)[stacked : stacked + len(spec.contracted)]
    return math.gcd(math.prod(inputs), NF4_BLOCK)


@functools.partial(jax.jit, static_argnums=1)
def to_nf4(w: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Linear maps (…, inputs, outputs) as uint4 of the same shape, and scales (…, blocks, outputs) in float32."""
    *stacked, inputs, outputs = w.shape
    wide = w.astype(jnp.float32).reshape(*stacked, inputs // block, block, outputs)
    scale = jnp.abs(wide).max(axis=-2)
    wide /= jnp.where(scale > 0, scale, 1)[..., None, :]
    between = [(low + high) / 2 for low, high in itertools.pairwise(NF4)]
    code = sum((wide > edge).astype(jnp.uint8) for edge in between)
    return jnp.asarray(code).reshape(w.shape).astype(jnp.uint4), scale


def abstract_weight(spec: ParamSpec, place: Sharding, dtype: Any, quantization: Quantization | None) -> Any:
    """The shape, dtype and sharding of an array, or of what is in its place in FP8 (a scale for each output) or NF4."""
    if quantization is None or not is_quantized(spec):
        return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype), sharding=place)
    of_values, blocks = E4M3, 1
    if quantization == "nf4":
        of_values, blocks = jnp.uint4, spec.matrix_shape[0] // nf4_block(spec, place)
    of_scale = place
    if isinstance(place, NamedSharding):
        of_scale = NamedSharding(place.mesh, fp8_scale_spec(spec, place.spec, blocks))
    scale = jax.ShapeDtypeStruct(scale_shape(spec, blocks), jnp.float32, sharding=of_scale)
    return Fp8Weight(jax.ShapeDtypeStruct(spec.shape, of_values, sharding=place), scale)


def abstract_model(config: ModelConfig, dtype: Any, mesh: Mesh, fp8: bool = False) -> Tree:
    """The parameters' shapes, dtypes and shardings on a mesh, for a compiler; linear maps perhaps in FP8."""
    return jax.tree.map(
        lambda spec, place: abstract_weight(spec, place, dtype, "fp8" if fp8 else None),
        declare(config),
        shardings(config, mesh),
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

    weight: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def with_adapter(self, adapter: Any, stacked: int, inputs: int, dtype: Any) -> jax.Array:
        """The weights with the adapter's update in them, rounded, in a dtype.

        Args:
            stacked: 1 with an axis of experts, else 0.
            inputs: how many of the axes after it are contracted.
        """
        shape = self.weight.shape
        matrices = (*shape[:stacked], math.prod(shape[stacked : stacked + inputs]), -1)
        w = self.weight.astype(jnp.float32).reshape(matrices)
        if adapter is not None:
            a = adapter.a.astype(jnp.float32).reshape(*matrices[:-1], adapter.a.shape[-1])
            b = adapter.b.astype(jnp.float32).reshape(*shape[:stacked], adapter.a.shape[-1], -1)
            w += adapter.scale * jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
        return fake_quantize(w).astype(dtype).reshape(shape)
