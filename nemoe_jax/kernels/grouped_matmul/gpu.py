"""Grouped matmul on NVIDIA GPUs (Ampere and later): Pallas kernels for Triton, whose programs take a tile of rows of
one expert each.

XLA's own `ragged_dot` multiplies every row with every expert there. JAX's and tokamax's kernels for Hopper's wgmma ask
for sizes that are multiples of their tiles, and in the table of timings on an H100 that tokamax 0.0.12 comes with,
Triton with the tiles chosen here is faster than they are for few experts with many rows (677 against 444 TFLOP/s for
8192 rows of Mixtral 8x7B; gradients of w 530 to 670 against 110), so these need no library and no fallback. JAX 0.11
and 0.12 have Pallas' Triton backend still, but call it deprecated.

XLA hands a kernel a copy of `w[layer]`, with all its experts. So the weights may be those of all layers, and each group
of rows says which matrix is its own: nothing else is read. That is what decoding needs (`gpu_few_rows`).

R rows, D inputs, F outputs, E experts, L layers, N matrices, M rows of a tile.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from nemoe_jax.spec.fp8_weight import E4M3

_LEAST = 16  # the smallest side of a tensor core's product
_BAND = 16  # tiles of rows that run at the same time over the same columns, so that both come out of the cache


class Blocks(NamedTuple):
    """What a program of the kernel multiplies at a time, (rows, inner) with (inner, columns).

    Columns and inner are limits: the largest power of two that divides the size is taken.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def row_blocks(rows: int, experts: int, dtype: Any) -> Blocks:
    """Blocks for products of rows with weights.

    An expert's last tile may hold a single row. Tiles of at most rows / (8 experts) rows waste an eighth of all rows at
    worst. Few rows are bound by reading the weights: narrow blocks, so that enough programs read at the same time.
    """
    largest = max(rows // (8 * experts), _LEAST)
    tile = min(1 << (largest.bit_length() - 1), 256)
    if jnp.dtype(dtype).itemsize > 2:  # no tensor cores for float32
        return Blocks(min(tile, 64), 64, 32, 4, 2)
    if tile >= 128 and _large_card():
        return Blocks(tile, 32768 // tile, 64, 8, 3)
    if tile >= 64:
        return Blocks(min(tile, 128), 128, 64, 4, 3)
    return Blocks(tile, 2 * tile, 128, 4, 96 // tile)


def outer_blocks(dtype: Any) -> Blocks:
    """Blocks for the gradient of the weights: (inner, rows)^T with (inner, columns)."""
    if jnp.dtype(dtype).itemsize > 2:
        return Blocks(64, 64, 32, 4, 2)
    return Blocks(128, 256, 64, 8, 3) if _large_card() else Blocks(128, 128, 64, 4, 3)


def tiles_at_most(rows: int, experts: int, tile: int) -> int:
    """The largest number of tiles that hold the rows of all experts, however they are spread."""
    return (rows + min(experts, rows) * (tile - 1)) // tile


def gpu_matmul(
    x_RD: jax.Array,
    w_NDF: jax.Array,
    sizes_E: jax.Array,
    matrix_E: jax.Array | None = None,
    transpose: bool = False,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """(R, D), (N, D, F), int32 (E,) -> (R, F) in x's dtype; rows beyond the last group are not defined.

    Args:
        matrix_E: int32: which matrix is a group's own; by default there are as many, in order.
        w_NDF: in x's dtype, or in float8_e4m3fn, whose scales are for the caller to multiply with.
        transpose: the weights are (N, F, D), and are read as they lie.
        blocks: by default `row_blocks`.
        interpret: runs it on any platform, slowly.
    """
    rows, groups = x_RD.shape[0], sizes_E.shape[0]
    blocks = blocks or row_blocks(rows, groups, x_RD.dtype)
    width = w_NDF.shape[1 if transpose else 2]
    if w_NDF.dtype != E4M3:  # which a tile widens when it is read
        w_NDF = w_NDF.astype(x_RD.dtype)
    x_RD, w_NDF = _padded(x_RD, blocks.rows), _padded(w_NDF)
    padded = w_NDF.shape[1 if transpose else 2]
    inner, columns = _divisor(x_RD.shape[1], blocks.inner), _divisor(padded, blocks.columns)
    tiles = tiles_at_most(rows, groups, blocks.rows)
    band = min(tiles, _BAND)
    y_RF = pl.pallas_call(
        functools.partial(
            _matmul_kernel, blocks=blocks._replace(inner=inner, columns=columns), band=band, transpose=transpose
        ),
        out_shape=jax.ShapeDtypeStruct((x_RD.shape[0], padded), x_RD.dtype),
        grid=(band, padded // columns, pl.cdiv(tiles, band)),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="grouped_matmul",
    )(x_RD, w_NDF, sizes_E, jnp.arange(groups, dtype=jnp.int32) if matrix_E is None else matrix_E)
    return y_RF[:rows, :width]


def gpu_few_rows(x_RD: jax.Array, w_LDF: jax.Array, layer: int | jax.Array, interpret: bool = False) -> jax.Array:
    """x @ w[layer], (R, F) in x's dtype."""
    rows_1 = jnp.full(1, x_RD.shape[0], jnp.int32)
    return gpu_matmul(x_RD, w_LDF, rows_1, jnp.full(1, layer, jnp.int32), interpret=interpret)


def gpu_few_rows_experts(
    x_RD: jax.Array, w_LEDF: jax.Array, layer: int | jax.Array, expert_R: jax.Array, interpret: bool = False
) -> jax.Array:
    """Row r of x @ w[layer, expert_R[r]], (R, F) in x's dtype. Sorted rows find their experts' weights in the cache."""
    experts = w_LEDF.shape[1]
    w_NDF = w_LEDF.reshape(-1, *w_LEDF.shape[2:])
    matrix_R = (layer * experts + expert_R).astype(jnp.int32)
    return gpu_matmul(x_RD, w_NDF, jnp.ones_like(matrix_R), matrix_R, interpret=interpret)


def _matmul_kernel(x_ref, w_ref, sizes_ref, matrix_ref, y_ref, *, blocks, band, transpose):
    tile, columns = pl.program_id(2) * band + pl.program_id(0), pl.ds(pl.program_id(1) * blocks.columns, blocks.columns)
    group, start, end = _group_of(tile, sizes_ref, blocks.rows)

    @pl.when(start < end)
    def _():
        row_M, at = _within(start, blocks.rows, x_ref)
        matrix = matrix_ref[group]

        def step(i, sofar):
            span = pl.ds(i * blocks.inner, blocks.inner)
            w = w_ref[matrix, columns, span] if transpose else w_ref[matrix, span, columns]
            return sofar + _dot(x_ref[at, span], w.astype(x_ref.dtype), 1, 1 if transpose else 0)

        zero = jnp.zeros((blocks.rows, blocks.columns), jnp.float32)
        y = lax.fori_loop(0, x_ref.shape[1] // blocks.inner, step, zero)
        mine_M = (row_M >= start) & (row_M < end)
        plgpu.store(y_ref.at[at, columns], y.astype(y_ref.dtype), mask=mine_M[:, None])


def _within(start, count, ref):
    """The numbers of `count` rows from `start` on, and where they are; earlier ones where those end too late."""
    begin = jnp.minimum(start, ref.shape[0] - count)
    return begin + jnp.arange(count), pl.ds(begin, count)


def _group_of(tile, sizes_ref, rows):
    """The tile's group, its first row and the end of that group's rows; start is end for tiles beyond the last."""

    def visit(group, carry):
        tiles, first, mine = carry
        size = sizes_ref[group]
        more = lax.div(size + rows - 1, rows)
        here = (tile >= tiles) & (tile < tiles + more)
        found = (group, first + (tile - tiles) * rows, first + size)
        mine = tuple(jnp.where(here, new, old) for new, old in zip(found, mine, strict=True))
        return tiles + more, first + size, mine

    none = jnp.int32(0)
    return lax.fori_loop(0, sizes_ref.shape[0], visit, (none, none, (none, none, none)))[2]


def gpu_outer(
    x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array, blocks: Blocks | None = None, interpret: bool = False
) -> jax.Array:
    """The gradient of w: for each group, x^T dy, as float32 (E, D, F)."""
    depth, width, experts = x_RD.shape[1], dy_RF.shape[1], sizes_E.shape[0]
    blocks = blocks or outer_blocks(x_RD.dtype)
    x_RD, dy_RF = _padded(x_RD, blocks.inner), _padded(dy_RF.astype(x_RD.dtype), blocks.inner)
    rows, columns = _divisor(x_RD.shape[1], blocks.rows), _divisor(dy_RF.shape[1], blocks.columns)
    dw_EDF = pl.pallas_call(
        functools.partial(_outer_kernel, blocks=blocks._replace(rows=rows, columns=columns)),
        out_shape=jax.ShapeDtypeStruct((experts, x_RD.shape[1], dy_RF.shape[1]), jnp.float32),
        grid=(x_RD.shape[1] // rows, dy_RF.shape[1] // columns, experts),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="grouped_outer",
    )(x_RD, dy_RF, sizes_E, jnp.cumsum(sizes_E))
    return dw_EDF[:, :depth, :width]


def _outer_kernel(x_ref, dy_ref, sizes_ref, ends_ref, dw_ref, *, blocks):
    expert = pl.program_id(2)
    depth, width = (pl.ds(pl.program_id(i) * n, n) for i, n in enumerate((blocks.rows, blocks.columns)))
    size, start = sizes_ref[expert], ends_ref[expert] - sizes_ref[expert]
    whole = lax.div(size, blocks.inner)

    def step(i, sofar):
        span = pl.ds(start + i * blocks.inner, blocks.inner)
        return sofar + _dot(x_ref[span, depth], dy_ref[span, width], 0, 0)

    zero = jnp.zeros((blocks.rows, blocks.columns), jnp.float32)
    total = lax.fori_loop(0, whole, step, zero)
    # what is left, once and masked: other rows may hold anything, NaN as well
    rest = start + whole * blocks.inner
    row_M, at = _within(rest, blocks.inner, x_ref)
    mine_M1 = ((row_M >= rest) & (row_M < start + size))[:, None]
    x, dy = (plgpu.load(ref.at[at, of], mask=mine_M1, other=0) for ref, of in ((x_ref, depth), (dy_ref, width)))
    dw_ref[expert, depth, width] = total + _dot(x, dy, 0, 0)


def _dot(x: jax.Array, w: jax.Array, x_axis: int, w_axis: int) -> jax.Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((x_axis,), (w_axis,)), ((), ()))
    return lax.dot_general(x, w, axes, precision=precision, preferred_element_type=jnp.float32)


def _divisor(size: int, limit: int) -> int:
    """The largest power of two that divides the size, `limit` at most."""
    return min(size & -size, limit)


def _padded(array: jax.Array, rows: int = 0) -> jax.Array:
    """Zeros up to `rows` rows and to multiples of the smallest block; real models and many rows need none."""
    more = [max(rows - array.shape[0], 0), *(-size % _LEAST for size in array.shape[1:])]
    return jnp.pad(array, [(0, each) for each in more]) if any(more) else array


def _large_card() -> bool:
    """Whether a program has the 160 KB of shared memory of the cards for data centers; where there is no card, yes."""
    try:
        capability = jax.local_devices(backend="gpu")[0].compute_capability
    except RuntimeError:
        return True
    return str(capability) not in ("8.6", "8.7", "8.9", "12.0", "12.1")
