"""A few rows times one layer of stacked weights on CPU: what a step of decoding is made of.

    y_RF = few_rows(x_RD, w_LDF, layer)                          the same matrix for every row
    y_RF = few_rows_experts(x_RD, w_LEDF, layer, expert_R)       a matrix for each row

Such a product costs what reading the weights costs. XLA:CPU copies `w[layer]` before a dot (or a reduction, which its
libraries take over too) reads it, with all its experts. Elementwise operations alone read a dynamic slice where it
lies. So the sum over D is spelt out as multiplications and additions of one row of weights each, a few of them in a
loop's body, and the loop's carry holds the running sums:

    for i in range(I):
        for u in range(U):                       spelt out: one fused kernel that reads U · P rows of weights
            sums_PRF += x[p, i, u] · w[layer, p, i, u]
    y_RF = sum over p                            after the loop, where XLA cannot fuse it with the weights

The rows D are P strips of I · U: P > 1 gives narrow matrices kernels of a size that is worth starting.

bfloat16 comes as its bits, uint16 (`bits`): XLA:CPU turns a whole stack of bfloat16 into float32 before it slices it.

R rows, D inputs, F outputs, L layers, E experts, P strips, I iterations, U rows of weights spelt out, N matrices.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MOST_ROWS = 8  # of which decoding this way is worth it; a dot that has copied its weights is faster with more
_GROUP = 4  # rows that share a kernel; with more its body no longer fits the registers
_LANES = 2048  # columns times strips of a kernel
_SPELT_OUT = 16


def bits(array: jax.Array) -> jax.Array:
    """The bits of a bfloat16 array on CPU as uint16, without a copy; other arrays as they are."""
    if array.dtype != jnp.bfloat16:
        return array
    return jax.device_put(np.asarray(array).view(np.uint16), array.sharding, may_alias=True)


def few_rows(x_RD: jax.Array, w_LDF: jax.Array, layer: int | jax.Array) -> jax.Array:
    """x @ w[layer], (R, F) in x's dtype, for float32 weights or bfloat16's bits; sums in float32."""
    groups = [_multiply(x_RD[r : r + _GROUP], w_LDF, layer) for r in range(0, len(x_RD), _GROUP)]
    return jnp.concatenate(groups).astype(x_RD.dtype)


def few_rows_experts(x_RD: jax.Array, w_LEDF: jax.Array, layer: int | jax.Array, expert_R: jax.Array) -> jax.Array:
    """Row r of x @ w[layer, expert_R[r]], (R, F) in x's dtype, for float32 weights or bfloat16's bits.

    Only the chosen experts' weights are read. Sort the rows by expert: then those that share one find it in the cache.
    """
    layers, experts, _, width = w_LEDF.shape
    w_NDF = w_LEDF.reshape(layers * experts, *w_LEDF.shape[2:])

    def run_row(r: jax.Array, y_RF: jax.Array) -> jax.Array:
        row_1F = _multiply(lax.dynamic_slice_in_dim(x_RD, r, 1), w_NDF, layer * experts + expert_R[r])
        return lax.dynamic_update_slice_in_dim(y_RF, row_1F, r, 0)

    return lax.fori_loop(0, len(x_RD), run_row, jnp.zeros((len(x_RD), width), jnp.float32)).astype(x_RD.dtype)


def _multiply(x_RD: jax.Array, w_NDF: jax.Array, number: int | jax.Array) -> jax.Array:
    """x @ w[number], float32 (R, F), for so few rows that they share a kernel."""
    (rows, depth), width = x_RD.shape, w_NDF.shape[2]
    columns = _divisor(width, _LANES if rows == 1 else _LANES // 2)
    spelt_out = _divisor(depth, _SPELT_OUT if rows == 1 else _SPELT_OUT // 2)
    strips = _divisor(depth // spelt_out, max(_LANES // columns, 2))
    cut = (strips, depth // (strips * spelt_out), spelt_out)
    w_NPIUF = w_NDF.reshape(len(w_NDF), *cut, width)
    x_PIUR = x_RD.astype(jnp.float32).T.reshape(*cut, rows)

    def run_columns(first: int | jax.Array) -> jax.Array:
        def step(i: jax.Array, sums_PRF: jax.Array) -> jax.Array:
            for u in range(spelt_out):
                w = lax.dynamic_slice(w_NPIUF, (number, 0, i, u, first), (1, strips, 1, 1, columns))
                x = lax.dynamic_slice(x_PIUR, (0, i, u, 0), (strips, 1, 1, rows))
                sums_PRF += x.reshape(strips, rows, 1) * _widen(w).reshape(strips, 1, columns)
            return sums_PRF

        return lax.fori_loop(0, cut[1], step, jnp.zeros((strips, rows, columns), jnp.float32)).sum(axis=0)

    if columns == width:
        return run_columns(0)

    def run_block(block: jax.Array, y_RF: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(y_RF, run_columns(block * columns), block * columns, 1)

    return lax.fori_loop(0, width // columns, run_block, jnp.zeros((rows, width), jnp.float32))


def _widen(w: jax.Array) -> jax.Array:
    if w.dtype != jnp.uint16:
        return w.astype(jnp.float32)
    return lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32)


@functools.cache
def _divisor(number: int, most: int) -> int:
    """The greatest divisor of a number that is at most `most`."""
    return max(
        d for low in range(1, math.isqrt(number) + 1) if number % low == 0 for d in (low, number // low) if d <= most
    )
