"""Grouped matmul on CPU: a loop over tiles of rows that belong to one expert each.

XLA's own `ragged_dot` multiplies every row with every expert there.

R rows, D inputs, F outputs, E experts, K rank of the adapters, M rows of a tile.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nemoe_jax.spec.fp8_weight import Fp8Weight


class Tile(NamedTuple):
    """Some rows in a row, of which `mine` belong to the tile's expert and to no other tile."""

    expert: jax.Array
    begin: jax.Array
    mine_M1: jax.Array

    def read(self, x_RD: jax.Array) -> jax.Array:
        """The tile's rows of x, (M, D)."""
        return lax.dynamic_slice_in_dim(x_RD, self.begin, len(self.mine_M1))

    def write(self, y_RF: jax.Array, new_MF: jax.Array) -> jax.Array:
        """y with the expert's own rows replaced."""
        new_MF = jnp.where(self.mine_M1, new_MF.astype(y_RF.dtype), self.read(y_RF))
        return lax.dynamic_update_slice_in_dim(y_RF, new_MF, self.begin, 0)

    def own(self, x_MD: jax.Array) -> jax.Array:
        """x with zeros in rows that are not the expert's own."""
        return jnp.where(self.mine_M1, x_MD, 0)

    def add(self, total_EDF: jax.Array, more_DF: jax.Array) -> jax.Array:
        """The total with more added to the expert's part."""
        part_DF = lax.dynamic_index_in_dim(total_EDF, self.expert, keepdims=False) + more_DF
        return lax.dynamic_update_index_in_dim(total_EDF, part_DF, self.expert, 0)


def tile_rows(rows: int, experts: int) -> int:
    """Rows of a small tile on CPU: a power of two, few enough that half-filled last tiles waste little.

    An expert's last tile may hold a single row. Tiles of at most rows / (8 experts) rows waste an eighth of all rows at
    worst; tiles of fewer than 8 rows are not worth their overhead.
    """
    largest = max(rows // (8 * experts), 8)
    return min(1 << (largest.bit_length() - 1), 64, rows)


def for_each_tile(
    sizes_E: jax.Array,
    rows: int,
    prepare: Callable[[jax.Array], Any],
    work: Callable[[Tile, Any, Any], Any],
    carry: Any,
) -> Any:
    """Runs `carry = work(tile, prepare(expert), carry)` over tiles that hold every row of every group once.

    Tiles of four times `tile_rows`, which keep two cores busy, then small ones for what is left of the group. Experts
    without rows cost nothing: their weights are not even read.
    """
    busy_E = jnp.argsort(sizes_E == 0)  # stable: first the experts that have rows, in order
    ends_E = jnp.cumsum(sizes_E)
    small = tile_rows(rows, len(sizes_E))
    large = min(4 * small, rows)

    def run_expert(number: jax.Array, carry: Any) -> Any:
        expert = busy_E[number]
        prepared, end = prepare(expert), ends_E[expert]
        first = end - sizes_E[expert]
        rest = first + (end - first) // large * large
        for size, start, stop in ((large, first, rest), (small, rest, end)):

            def run_tile(t: jax.Array, carry: Any, size: int = size, start: jax.Array = start) -> Any:
                # the last tile starts early enough to lie within the rows, which spares a padded copy of them
                begin = jnp.minimum(start + t * size, rows - size)
                row_M = begin + jnp.arange(size)
                mine_M = (row_M >= start + t * size) & (row_M < end)
                return work(Tile(expert, begin, mine_M[:, None]), prepared, carry)

            carry = lax.fori_loop(0, (stop - start + size - 1) // size, run_tile, carry)
        return carry

    return lax.fori_loop(0, jnp.sum(sizes_E > 0), run_expert, carry)


def dot(x: jax.Array, w: jax.Array, axes: tuple[int, int] = (1, 0)) -> jax.Array:
    return lax.dot_general(x, w, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def pick(array: jax.Array | Fp8Weight, expert: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """An expert's part; of FP8 weights that matrix alone, dequantized."""
    if isinstance(array, Fp8Weight):
        return array.at(expert).dequantized(dtype)
    return lax.dynamic_index_in_dim(array, expert, keepdims=False)


def tiled_matmul(x_RD, w_EDF, sizes_E, transpose=False):
    rows, axes = len(x_RD), (1, 1 if transpose else 0)

    def work(tile, w_DF, y_RF):
        return tile.write(y_RF, dot(tile.read(x_RD), w_DF, axes))

    y_RF = jnp.zeros((rows, w_EDF.shape[1 if transpose else 2]), x_RD.dtype)
    return for_each_tile(sizes_E, rows, functools.partial(pick, w_EDF, dtype=x_RD.dtype), work, y_RF)


def tiled_outer(x_RD, dy_RF, sizes_E):
    def work(tile, _, dw_EDF):
        return tile.add(dw_EDF, dot(tile.own(tile.read(x_RD)), tile.read(dy_RF), (0, 0)))

    dw_EDF = jnp.zeros((len(sizes_E), x_RD.shape[1], dy_RF.shape[1]), jnp.float32)
    return for_each_tile(sizes_E, len(x_RD), lambda expert: None, work, dw_EDF)


def _beside(maps: Any, expert: jax.Array, dtype: Any) -> jax.Array:
    """An expert's weights and first factors side by side, (D, F + … + K + …), for one product instead of several.

    The copy takes the place of that which picks the expert's weights anyway.
    """
    columns = [*(w_EDF for w_EDF, _, _ in maps), *(a_EDK for _, a_EDK, _ in maps)]
    return jnp.concatenate([pick(array, expert, dtype) for array in columns], axis=1)


def tiled_lora(x_RD, maps, sizes_E, scales):
    def prepare(expert):
        return _beside(maps, expert, x_RD.dtype), [pick(b_EKF, expert) for _, _, b_EKF in maps]

    def work(tile, weights, carry):
        (wa, bs), (ys, lows) = weights, carry
        parts = jnp.split(dot(tile.read(x_RD), wa), cuts, axis=1)
        lows_MK = [part.astype(x_RD.dtype) for part in parts[len(maps) :]]
        ys_MF = [y + scale * dot(low, b) for y, scale, low, b in zip(parts, scales, lows_MK, bs, strict=False)]
        return tuple(map(tile.write, ys, ys_MF)), tuple(map(tile.write, lows, lows_MK))

    widths = [*(w_EDF.shape[2] for w_EDF, _, _ in maps), *(a_EDK.shape[2] for _, a_EDK, _ in maps)]
    cuts = list(itertools.accumulate(widths))[:-1]
    ys = tuple(jnp.zeros((len(x_RD), w_EDF.shape[2]), x_RD.dtype) for w_EDF, _, _ in maps)
    lows = tuple(jnp.zeros((len(x_RD), a_EDK.shape[2]), x_RD.dtype) for _, a_EDK, _ in maps)
    return for_each_tile(sizes_E, len(x_RD), prepare, work, (ys, lows))


def tiled_lora_gradients(x_RD, lows, dys, maps, sizes_E, scales):
    def prepare(expert):
        return _beside(maps, expert, x_RD.dtype), [pick(b_EKF, expert) for _, _, b_EKF in maps]

    def work(tile, weights, carry):
        (wa, bs), (dx_RD, das, dbs) = weights, carry
        x_MD, dys_MF = tile.read(x_RD), [tile.read(dy_RF) for dy_RF in dys]
        dlows_MK = [
            (scale * dot(dy, b, (1, 1))).astype(x_RD.dtype) for scale, dy, b in zip(scales, dys_MF, bs, strict=True)
        ]
        dx_MD = dot(jnp.concatenate([*dys_MF, *dlows_MK], axis=1), wa, (1, 1))
        das = [tile.add(da_EKD, dot(tile.own(dlow), x_MD, (0, 0))) for da_EKD, dlow in zip(das, dlows_MK, strict=True)]
        dbs = [
            tile.add(db_EKF, scale * dot(tile.own(tile.read(low_RK)), dy, (0, 0)))
            for db_EKF, scale, low_RK, dy in zip(dbs, scales, lows, dys_MF, strict=True)
        ]
        return tile.write(dx_RD, dx_MD), das, dbs

    # a's gradient is summed transposed: a product that is wide rather than tall is twice as fast
    das = [jnp.zeros((a_EDK.shape[0], *a_EDK.shape[:0:-1]), jnp.float32) for _, a_EDK, _ in maps]
    dbs = [jnp.zeros(b_EKF.shape, jnp.float32) for _, _, b_EKF in maps]
    dx_RD, das, dbs = for_each_tile(sizes_E, len(x_RD), prepare, work, (jnp.zeros_like(x_RD), das, dbs))
    return dx_RD, tuple((da_EKD.swapaxes(1, 2), db_EKF) for da_EKD, db_EKF in zip(das, dbs, strict=True))
