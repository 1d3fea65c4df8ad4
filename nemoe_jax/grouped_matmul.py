"""Grouped matmul: rows sorted by expert, each multiplied with its own expert's matrix.

    y_RF[r] = x_RD[r] @ w_EDF[expert of row r]        rows r in groups of sizes_E, in order

`jax.lax.ragged_dot` is a real kernel on TPU. On CPU it multiplies every row with every expert, so there the rows are
cut into tiles that belong to one expert each, and a loop runs over the tiles that exist. Rows beyond the last group
(experts that live on another device) are neither computed nor defined.

R rows, D inputs, F outputs, E experts, M rows of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """(R, D), (E, D, F), int32 (E,) -> (R, F) in x's dtype; accumulates in float32.

    Differentiable in x and w. The gradient of w is a computation of its own, so that it vanishes from the compiled
    program where nobody asks for it (a frozen base).
    """
    return lax.platform_dependent(x_RD, w_EDF, sizes_E, cpu=_tiled_matmul, default=_ragged_matmul)


def _forward(x_RD, w_EDF, sizes_E):
    return grouped_matmul(x_RD, w_EDF, sizes_E), (x_RD, w_EDF, sizes_E)


def _backward(residuals, dy_RF):
    x_RD, w_EDF, sizes_E = residuals
    dx_RD = lax.platform_dependent(
        dy_RF, w_EDF, sizes_E, cpu=functools.partial(_tiled_matmul, transpose=True), default=_ragged_matmul_transposed
    )
    dw_EDF = lax.platform_dependent(
        x_RD, dy_RF.astype(x_RD.dtype), sizes_E, cpu=_tiled_outer, default=_ragged_outer
    ).astype(w_EDF.dtype)
    return dx_RD, dw_EDF, None


grouped_matmul.defvjp(_forward, _backward)


def _ragged_matmul(x_RD, w_EDF, sizes_E):
    return lax.ragged_dot(x_RD, w_EDF, sizes_E, preferred_element_type=x_RD.dtype)


def _ragged_matmul_transposed(dy_RF, w_EDF, sizes_E):
    return _ragged_matmul(dy_RF, w_EDF.swapaxes(1, 2), sizes_E)


def _ragged_outer(x_RD, dy_RF, sizes_E):
    """Gradient of w: for each group, x^T dy, as (E, D, F)."""
    over_rows = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(x_RD, dy_RF, sizes_E, over_rows, preferred_element_type=jnp.float32)


def tile_rows(rows: int, experts: int) -> int:
    """Rows of a tile on CPU: a power of two, small enough that half-filled last tiles waste little.

    An expert's last tile may hold a single row. Tiles of at most rows / (8 experts) rows waste an eighth of all rows at
    worst; tiles of fewer than 8 rows are not worth their overhead.
    """
    largest = max(rows // (8 * experts), 8)
    return min(1 << (largest.bit_length() - 1), 256, rows)


def tile_plan(sizes_E: jax.Array, tile: int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(number of tiles, then for each tile: its expert, its first row, the end of its group), int32.

    The arrays have the static length of the worst case, `rows // tile + experts`; entries past the number of tiles
    mean nothing.
    """
    experts = sizes_E.shape[0]
    worst = rows // tile + min(experts, rows)
    ends_E = jnp.cumsum(sizes_E)
    tiles_E = (sizes_E + tile - 1) // tile
    last_E = jnp.cumsum(tiles_E)
    number = jnp.arange(worst)
    expert = jnp.minimum(jnp.searchsorted(last_E, number, side="right"), experts - 1)
    within = number - (last_E - tiles_E)[expert]
    first = (ends_E - sizes_E)[expert] + within * tile
    return last_E[-1], expert, first, ends_E[expert]


def _tiled_matmul(x_RD, w_EDF, sizes_E, transpose=False):
    rows = x_RD.shape[0]
    tile = tile_rows(rows, sizes_E.shape[0])
    tiles, expert, first, _ = tile_plan(sizes_E, tile, rows)
    contraction = ((1,), (1 if transpose else 0,))

    def body(t, y):
        # A group's last tile runs over into the next group's rows; that group's own tiles come later and overwrite.
        x_MD = lax.dynamic_slice_in_dim(x, first[t], tile)
        w_DF = lax.dynamic_index_in_dim(w_EDF, expert[t], keepdims=False)
        y_MF = lax.dot_general(x_MD, w_DF, (contraction, ((), ())), preferred_element_type=jnp.float32)
        return lax.dynamic_update_slice_in_dim(y, y_MF.astype(y.dtype), first[t], 0)

    x = jnp.pad(x_RD, ((0, tile), (0, 0)))
    y = jnp.zeros((rows + tile, w_EDF.shape[1 if transpose else 2]), x_RD.dtype)
    return lax.fori_loop(0, tiles, body, y)[:rows]


def _tiled_outer(x_RD, dy_RF, sizes_E):
    rows, experts = x_RD.shape[0], sizes_E.shape[0]
    tile = tile_rows(rows, experts)
    tiles, expert, first, end = tile_plan(sizes_E, tile, rows)

    def body(t, dw_EDF):
        inside_M = (first[t] + jnp.arange(tile) < end[t])[:, None]
        x_MD = jnp.where(inside_M, lax.dynamic_slice_in_dim(x, first[t], tile), 0)
        dy_MF = lax.dynamic_slice_in_dim(dy, first[t], tile)
        dw_DF = lax.dot_general(x_MD, dy_MF, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        sofar = lax.dynamic_index_in_dim(dw_EDF, expert[t], keepdims=False)
        return lax.dynamic_update_index_in_dim(dw_EDF, sofar + dw_DF, expert[t], 0)

    x, dy = (jnp.pad(array, ((0, tile), (0, 0))) for array in (x_RD, dy_RF))
    return lax.fori_loop(0, tiles, body, jnp.zeros((experts, x.shape[1], dy.shape[1]), jnp.float32))
