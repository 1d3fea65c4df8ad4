"""A few rows times one layer of stacked weights on CPU: what a step of decoding is made of.

    y_RF = few_rows(x_RD, w_LDF, layer)                          the same matrix for every row
    y_RF = decode_expert_matmul(x_RD, w_LEDF, layer, expert_R)       a matrix for each row

Such a product costs what reading the weights costs. XLA:CPU copies `w[layer]`, with all its experts, before a dot (or a
reduction, which its libraries take over too) reads it. Elementwise operations alone read a dynamic slice, or what a
gather picks, where it lies. So the sum over D is spelt out as multiplications and additions of one row of weights each,
a few of them in a loop's body, and the loop's carry holds the running sums:

    for i in range(I):
        for u in range(U):                       spelt out: one fused kernel that reads U · P rows of weights
            sums_PRF += x[i, u, p] · w[layer, i, u, p]
    y_RF = sum over p                            after the loop, where XLA cannot fuse it with the weights

P rows that follow one another are taken as one wide row: narrow matrices so get kernels that are worth starting, and
worth sharing between cores where there is much to compute. The sizes below were chosen by measurement.

bfloat16 comes as its bits, uint16 (`as_uint16`), float8_e4m3fn as uint8 (spec/fp8_weight): XLA:CPU turns a whole stack
of either into wider floats before it slices it.

R rows, D inputs, F outputs, L layers, E experts, I iterations, U spelt out, P rows of
weights side by side, T tiles of V columns.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nemoe_jax.spec.fp8_weight import widen

MOST_ROWS = 8  # with more, a dot that has copied its weights is faster


def as_uint16(array: jax.Array) -> jax.Array:
    """The bits of a bfloat16 array on CPU as uint16, without a copy; other arrays as they are."""
    if array.dtype != jnp.bfloat16:
        return array
    return jax.device_put(np.asarray(array).view(np.uint16), array.sharding, may_alias=True)


@jax.jit  # traced once for the layer's matrices of one shape
def decode_matmul(x_RD: jax.Array, w_LDF: jax.Array, layer: int | jax.Array) -> jax.Array:
    """x @ w[layer], (R, F) in x's dtype, for float32 weights or the bits of others; sums in float32."""
    (rows, depth), width = x_RD.shape, w_LDF.shape[2]
    if any(4 * _divisor(size, most) < min(size, most) for size, most in ((width, 1024), (depth, 16))):
        # (next to) a prime number of columns or of rows of weights: loops over slivers take longer than a copy
        w_DF = _widen(lax.dynamic_index_in_dim(w_LDF, layer, keepdims=False))
        return jnp.matmul(x_RD.astype(jnp.float32), w_DF).astype(x_RD.dtype)
    if rows == 1:
        return _one_row(x_RD, w_LDF, layer)
    # V columns of all rows at a time: what is read of the weights for one row is at hand for the next
    tile = _divisor(width, 32)
    tiles = _divisor(width // tile, 1024 // tile)
    cut = _cut(depth, 8, rows * 1024 // (tiles * tile))
    w_LIUPTV, x_IUPR = w_LDF.reshape(-1, *cut, width // tile, tile), x_RD.astype(jnp.float32).T.reshape(*cut, rows)

    def run_columns(block: int | jax.Array) -> jax.Array:
        def product(i: jax.Array, u: int) -> jax.Array:
            x = _slice(x_IUPR, (i, u, 0, 0), (1, 1, cut[2], rows))
            w = _slice(w_LIUPTV, (layer, i, u, 0, block * tiles, 0), (1, 1, 1, cut[2], tiles, tile))
            return x.reshape(-1, 1, rows, 1) * _widen(w).reshape(-1, tiles, 1, tile)

        sums_PTRV = _sum(product, cut, jnp.zeros((cut[2], tiles, rows, tile), jnp.float32))
        # a dot takes its operands as they lie: a transposed sum would have XLA transpose the weights
        y_TRV = (jnp.ones((1, cut[2])) @ sums_PTRV.reshape(cut[2], -1)).reshape(tiles, rows, tile)
        return y_TRV.transpose(1, 0, 2).reshape(rows, -1)

    return _by_blocks(run_columns, rows, tiles * tile, width).astype(x_RD.dtype)


def _one_row(x_1D: jax.Array, w_LDF: jax.Array, layer: int | jax.Array) -> jax.Array:
    depth, width = w_LDF.shape[1:]
    # XLA shares a kernel between cores by the bytes that come out of it: only a wide matrix has enough
    columns = _divisor(width, 32768 if width > 8192 else 2048)
    cut = _cut(depth, 16, 2048 // columns)
    w_LIUPF, x_IUP = w_LDF.reshape(-1, *cut, width), x_1D.astype(jnp.float32).reshape(cut)

    def run_columns(block: int | jax.Array) -> jax.Array:
        def product(i: jax.Array, u: int) -> jax.Array:
            x = _slice(x_IUP, (i, u, 0), (1, 1, cut[2]))
            w = _slice(w_LIUPF, (layer, i, u, 0, block * columns), (1, 1, 1, cut[2], columns))
            return x.reshape(-1, 1) * _widen(w).reshape(-1, columns)

        return _sum(product, cut, jnp.zeros((cut[2], columns), jnp.float32)).sum(axis=0, keepdims=True)

    return _by_blocks(run_columns, 1, columns, width).astype(x_1D.dtype)


def _by_blocks(run: Callable[[int | jax.Array], jax.Array], rows: int, columns: int, width: int) -> jax.Array:
    """What `run` gives for each block of so many columns, side by side: float32 (R, F)."""
    if columns == width:
        return run(0)

    def step(block: jax.Array, y_RF: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(y_RF, run(block), block * columns, 1)

    return lax.fori_loop(0, width // columns, step, jnp.zeros((rows, width), jnp.float32))


def decode_expert_matmul(x_RD: jax.Array, w_LEDF: jax.Array, layer: int | jax.Array, expert_R: jax.Array) -> jax.Array:
    """Row r of x @ w[layer, expert_R[r]], (R, F) in x's dtype, for float32 weights or the bits of others.

    Only the chosen experts' weights are read. Sort the rows by expert: then those that share one find it in the cache.
    """
    rows, depth, width = len(x_RD), *w_LEDF.shape[2:]
    cut = _cut(depth, 16, 1024 // width)
    w_NIUPF, x_RIUP = w_LEDF.reshape(-1, *cut, width), x_RD.astype(jnp.float32).reshape(-1, *cut)
    number_R = layer * w_LEDF.shape[1] + expert_R

    def product(i: jax.Array, u: int) -> jax.Array:
        x = _slice(x_RIUP, (0, i, u, 0), (rows, 1, 1, cut[2]))
        return x.reshape(rows, -1, 1) * _widen(w_NIUPF.at[number_R, i, u].get(mode="promise_in_bounds"))

    return _sum(product, cut, jnp.zeros((rows, cut[2], width), jnp.float32)).sum(axis=1).astype(x_RD.dtype)


def _cut(depth: int, spelt_out: int, side_by_side: int) -> tuple[int, int, int]:
    """I, U and P: about so many spelt out and so many side by side.

    But P is two at least, else XLA would choose to transpose the weights, and I as well, else there is no loop.
    """
    spelt_out = _divisor(depth, spelt_out)
    side_by_side = _divisor(depth // spelt_out, max(min(side_by_side, depth // (2 * spelt_out)), 2))
    return depth // (spelt_out * side_by_side), spelt_out, side_by_side


def _sum(product: Callable[[jax.Array, int], jax.Array], cut: tuple[int, int, int], zeros: jax.Array) -> jax.Array:
    """The sum of the products of all i and u."""

    def step(i: jax.Array, sums: jax.Array) -> jax.Array:
        return functools.reduce(lambda sums, u: sums + product(i, u), range(cut[1]), sums)

    return lax.fori_loop(0, cut[0], step, zeros)


# indices count from the beginning: without what would let them count from the end, programs are a third as long
_slice = functools.partial(lax.dynamic_slice, allow_negative_indices=False)


def _widen(w: jax.Array) -> jax.Array:
    if w.dtype != jnp.uint16:
        return widen(w)
    return lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32)


@functools.cache
def _divisor(number: int, most: int) -> int:
    """The greatest divisor of a number that is at most `most`."""
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)
