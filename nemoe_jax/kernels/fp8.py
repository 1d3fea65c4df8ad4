"""Products with weights that stay in FP8.

    y_RF = fp8_matmul(x_RD, weight)           weight.values (D, F) in float8_e4m3fn, weight.scale (blocks, F) in float32

Where the hardware multiplies in FP8 (`has_fp8_products`) activations are rounded to float8_e4m3fn as well, each row by
its own scale. Elsewhere one matrix is dequantized where it is used: compilers do so as they read it for the product.

R rows, D inputs, F outputs, K blocks of inputs that share a scale, E experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from nemoe_jax.kernels.backend import target_device_kind, target_platform
from nemoe_jax.spec.fp8_weight import E4M3, MAX, Fp8Weight, widen
from nemoe_jax.spec.mesh import spans_devices

_TPUS = ("TPU v6 lite", "TPU v6e", "TPU7x", "TPU v7")  # whose products take FP8
_CAPABILITY = 8.9  # of NVIDIA's: Ada, Hopper and later


def has_fp8_products(dtype: Any) -> bool:
    """Whether rows of that dtype are rounded to FP8 for products with FP8 weights on the target device."""
    if dtype != jnp.bfloat16:
        return False
    platform = target_platform()
    if platform == "tpu":
        return target_device_kind().startswith(_TPUS)
    if platform != "gpu":
        return False
    try:
        return float(jax.local_devices(backend="gpu")[0].compute_capability) >= _CAPABILITY
    except RuntimeError:  # compiled for a card that is not there: one for data centers
        return True


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float8_e4m3fn (…, D) and float32 scales (…, 1) whose product is x, rounded: max |x| / 448 of each row."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest / MAX, 1)
    return (x / scale).clip(-MAX, MAX).astype(E4M3), scale


@jax.custom_vjp
def fp8_matmul(x: jax.Array, weight: Fp8Weight) -> jax.Array:
    """(R, inputs…), weights (inputs…, outputs…) -> (R, outputs…) in x's dtype: x @ (values · scale), summed in float32.

    Axes are not flattened where scales are those of outputs alone: a TPU would copy the weights for it, in float32.
    The weights are frozen. The gradient of x is that of the product with them dequantized, as if x were not rounded.
    """
    dtype, blocks, inputs = x.dtype, weight.scale.shape[0], x.ndim - 1
    if blocks > 1:
        return _by_blocks(x.reshape(len(x), -1), weight.matrices()).reshape(len(x), *weight.shape[inputs:])
    values, of_rows = weight.values, None
    if has_fp8_products(dtype) and weight.is_fp8:
        x, of_rows = quantize_rows(x.reshape(len(x), -1))
        x = x.reshape(len(x), *values.shape[:inputs])
        values = _as_stored(values)
    else:
        values = widen(values).astype(dtype)
    contracted = tuple(range(1, inputs + 1)), tuple(range(inputs))
    y = lax.dot_general(
        x, values, (contracted, ((), ())), precision=_precision(dtype), preferred_element_type=jnp.float32
    )
    y *= weight.scale
    return (y if of_rows is None else y * of_rows.reshape(-1, *(1,) * (y.ndim - 1))).astype(dtype)


def _forward(x, weight):
    return fp8_matmul(x, weight), weight


def _backward(weight, dy):
    inputs = len(weight.shape) - (dy.ndim - 1)
    outputs = tuple(range(inputs, len(weight.shape)))
    contracted = tuple(range(1, dy.ndim)), outputs
    weights = weight.dequantized(dy.dtype).reshape(weight.shape)
    return lax.dot_general(dy, weights, (contracted, ((), ())), precision=_precision(dy.dtype)), None


fp8_matmul.defvjp(_forward, _backward)


def _by_blocks(x_RD: jax.Array, weight: Fp8Weight) -> jax.Array:
    """`fp8_matmul` where several blocks of inputs have scales of their own, (R, F)."""
    depth, blocks = weight.values.shape[0], weight.scale.shape[0]
    if not (has_fp8_products(x_RD.dtype) and weight.is_fp8):
        return jnp.matmul(x_RD, weight.dequantized(x_RD.dtype), precision=_precision(x_RD.dtype))
    rounded_RD, scale_R1 = quantize_rows(x_RD)
    x_RKD = rounded_RD.reshape(-1, blocks, depth // blocks)
    values_KDF = _as_stored(weight.values).reshape(blocks, depth // blocks, -1)
    y_KRF = jnp.einsum("rkd,kdf->krf", x_RKD, values_KDF, preferred_element_type=jnp.float32)
    return (jnp.sum(y_KRF * weight.scale[:, None], axis=0) * scale_R1).astype(x_RD.dtype)


def _as_stored(values: jax.Array) -> jax.Array:
    """Keeps XLA for GPUs, whose FP8 products want inputs last, from laying out anew all layers' weights at once.

    Where weights are cut over devices it may: it would gather them for this.
    """
    if target_platform() != "gpu" or spans_devices(jax.sharding.get_abstract_mesh()):
        return values
    return with_layout_constraint(values, Layout(tuple(range(values.ndim))))


def _precision(dtype: Any) -> lax.Precision | None:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None
