"""Grouped matmul: rows sorted by expert, each multiplied with its own expert's matrix, and perhaps its own adapter.

    y_RF[r] = x_RD[r] @ w_EDF[expert of row r]        rows r in groups of sizes_E, in order

`jax.lax.ragged_dot` is a real kernel on TPU. Elsewhere it multiplies every row with every expert: on CPU a loop runs
over tiles of rows instead (cpu.py), and NVIDIA GPUs have kernels (gpu.py). Rows beyond
the last group (experts that live on another device) are neither computed nor defined.

Weights in FP8 stay so: tiles dequantize one expert's matrix each; where rows go through `ragged_dot`, those of one
layer's experts are dequantized, and none where the hardware has products in FP8. A few tokens on a TPU meet every
expert instead (few_tokens_tpu.py).

R rows, D inputs, F outputs, E experts, K rank of the adapters.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nemoe_jax.kernels.backend import target_platform
from nemoe_jax.kernels.fp8 import has_fp8_products, quantize_rows
from nemoe_jax.kernels.grouped_matmul.cpu import tiled_lora, tiled_lora_gradients, tiled_matmul, tiled_outer
from nemoe_jax.spec.fp8_weight import Fp8Weight


@jax.custom_vjp
def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array | Fp8Weight, sizes_E: jax.Array) -> jax.Array:
    """(R, D), (E, D, F), int32 (E,) -> (R, F) in x's dtype; accumulates in float32.

    Differentiable in x and w. The gradient of w is a computation of its own, so that it vanishes from the compiled
    program where nobody asks for it (a frozen base).
    """
    return lax.platform_dependent(x_RD, w_EDF, sizes_E, cpu=tiled_matmul, default=_ragged_matmul)


def _forward(x_RD, w_EDF, sizes_E):
    return grouped_matmul(x_RD, w_EDF, sizes_E), (x_RD, w_EDF, sizes_E)


def _backward(residuals, dy_RF):
    x_RD, w_EDF, sizes_E = residuals
    dx_RD = lax.platform_dependent(
        dy_RF, w_EDF, sizes_E, cpu=functools.partial(tiled_matmul, transpose=True), default=_ragged_matmul_transposed
    )
    return dx_RD, _weight_gradient(w_EDF, x_RD, dy_RF, sizes_E), None


def _weight_gradient(w_EDF, x_RD, dy_RF, sizes_E):
    if isinstance(w_EDF, Fp8Weight):  # frozen always
        return jax.tree.map(jnp.zeros_like, w_EDF)
    return _outer(x_RD, dy_RF, sizes_E).astype(w_EDF.dtype)


grouped_matmul.defvjp(_forward, _backward)


class Adapted(NamedTuple):
    """The experts' weights with their adapters: x @ w + scale · (x @ a) @ b."""

    w_EDF: jax.Array | Fp8Weight
    a_EDK: jax.Array
    b_EKF: jax.Array
    scale: float


def grouped_lora(x_RD: jax.Array, maps: tuple[Adapted, ...], sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    """What each of the maps makes of the same rows: (R, F) in x's dtype, as `grouped_matmul` would product by product.

    One pass over the rows on CPU. Differentiable in x, w, a and b; the gradient of w vanishes as above.
    """
    scales = tuple(one.scale for one in maps)
    return _lora(x_RD, tuple((one.w_EDF, one.a_EDK, one.b_EKF) for one in maps), sizes_E, scales)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _lora(x_RD, maps, sizes_E, scales):
    return _lora_forward(x_RD, maps, sizes_E, scales)[0]


def _lora_forward(x_RD, maps, sizes_E, scales):
    ys, lows = lax.platform_dependent(
        x_RD,
        _cast(maps, x_RD.dtype),
        sizes_E,
        cpu=functools.partial(tiled_lora, scales=scales),
        default=functools.partial(_ragged_lora, scales=scales),
    )
    return ys, (x_RD, lows, maps, sizes_E)


def _lora_backward(scales, residuals, dys):
    x_RD, lows, maps, sizes_E = residuals
    dx_RD, factors = lax.platform_dependent(
        x_RD,
        lows,
        _cast(dys, x_RD.dtype),
        _cast(maps, x_RD.dtype),
        sizes_E,
        cpu=functools.partial(tiled_lora_gradients, scales=scales),
        default=functools.partial(_ragged_lora_gradients, scales=scales),
    )
    gradients = tuple(
        (_weight_gradient(w_EDF, x_RD, dy_RF, sizes_E), da.astype(a.dtype), db.astype(b.dtype))
        for (w_EDF, a, b), dy_RF, (da, db) in zip(maps, dys, factors, strict=True)
    )
    return dx_RD, gradients, None


_lora.defvjp(_lora_forward, _lora_backward)


def _cast(tree: Any, dtype: Any) -> Any:
    """Arrays in a dtype; FP8 weights as they are."""

    def cast(leaf: Any) -> Any:
        return leaf if isinstance(leaf, Fp8Weight) else leaf.astype(dtype)

    return jax.tree.map(cast, tree, is_leaf=lambda leaf: isinstance(leaf, Fp8Weight))


def _outer(x_RD, dy_RF, sizes_E):
    """Gradient of w: for each group, x^T dy, as float32 (E, D, F)."""
    return lax.platform_dependent(x_RD, dy_RF.astype(x_RD.dtype), sizes_E, cpu=tiled_outer, default=_ragged_outer)


def precision_of(dtype: Any) -> lax.Precision | None:
    """HIGHEST for float32: it asks for float32 products, which TPUs do not give by default."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _ragged_matmul(x_RD, w_EDF, sizes_E):
    if target_platform() == "gpu":
        from nemoe_jax.kernels.grouped_matmul.gpu import gpu_matmul  # Pallas takes half a second to import

        if not isinstance(w_EDF, Fp8Weight):
            return gpu_matmul(x_RD, w_EDF, sizes_E)
        if w_EDF.scale.shape[1] > 1 or not w_EDF.is_fp8:
            return gpu_matmul(x_RD, w_EDF.dequantized(x_RD.dtype, stacked=1), sizes_E)
        y_RF = gpu_matmul(x_RD, w_EDF.values, sizes_E)
        return (y_RF * _scale_of_rows(w_EDF, sizes_E, len(y_RF))).astype(x_RD.dtype)
    if isinstance(w_EDF, Fp8Weight):
        if has_fp8_products(x_RD.dtype) and w_EDF.scale.shape[1] == 1 and w_EDF.is_fp8:
            return _ragged_fp8(x_RD, w_EDF, sizes_E)
        w_EDF = w_EDF.dequantized(x_RD.dtype, stacked=1)
    precision = precision_of(x_RD.dtype)
    return lax.ragged_dot(x_RD, w_EDF, sizes_E, precision=precision, preferred_element_type=x_RD.dtype)


def _scale_of_rows(w_EDF, sizes_E, rows):
    """Each row's scales, (R, F), where they are those of outputs alone."""
    expert_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(rows), side="right", method="compare_all")
    return w_EDF.scale[:, 0].at[expert_R].get(mode="clip")


def _ragged_fp8(x_RD, w_EDF, sizes_E):
    """Products in FP8, of rows and weights with a scale for each row and each output."""
    x_RD, scale_R1 = quantize_rows(x_RD)
    y_RF = lax.ragged_dot(x_RD, w_EDF.values, sizes_E, preferred_element_type=jnp.float32)
    return (y_RF * scale_R1 * _scale_of_rows(w_EDF, sizes_E, len(x_RD))).astype(jnp.bfloat16)


def _ragged_matmul_transposed(dy_RF, w_EDF, sizes_E):
    if isinstance(w_EDF, Fp8Weight):
        w_EDF = w_EDF.dequantized(dy_RF.dtype, stacked=1)
    if target_platform() == "gpu":
        from nemoe_jax.kernels.grouped_matmul.gpu import gpu_matmul  # Pallas takes half a second to import

        return gpu_matmul(dy_RF, w_EDF, sizes_E, transpose=True)
    return _ragged_matmul(dy_RF, w_EDF.swapaxes(1, 2), sizes_E)


def _ragged_outer(x_RD, dy_RF, sizes_E):
    if target_platform() == "gpu":
        from nemoe_jax.kernels.grouped_matmul.gpu import gpu_outer  # Pallas takes half a second to import

        return gpu_outer(x_RD, dy_RF, sizes_E)
    over_rows = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    precision = precision_of(x_RD.dtype)
    return lax.ragged_dot_general(
        x_RD, dy_RF, sizes_E, over_rows, precision=precision, preferred_element_type=jnp.float32
    )


def _ragged_lora(x_RD, maps, sizes_E, scales):
    ys, lows = [], []
    for (w_EDF, a_EDK, b_EKF), scale in zip(maps, scales, strict=True):
        lows.append(_ragged_matmul(x_RD, a_EDK, sizes_E))
        ys.append(_ragged_matmul(x_RD, w_EDF, sizes_E) + scale * _ragged_matmul(lows[-1], b_EKF, sizes_E))
    return tuple(ys), tuple(lows)


def _ragged_lora_gradients(x_RD, lows, dys, maps, sizes_E, scales):
    parts, factors = [], []
    for (w_EDF, a_EDK, b_EKF), scale, low_RK, dy_RF in zip(maps, scales, lows, dys, strict=True):
        dlow_RK = scale * _ragged_matmul_transposed(dy_RF, b_EKF, sizes_E)
        parts += [_ragged_matmul_transposed(dy_RF, w_EDF, sizes_E), _ragged_matmul_transposed(dlow_RK, a_EDK, sizes_E)]
        factors.append((_ragged_outer(x_RD, dlow_RK, sizes_E), scale * _ragged_outer(low_RK, dy_RF, sizes_E)))
    return functools.reduce(jnp.add, parts), tuple(factors)
