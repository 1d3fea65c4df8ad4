"""The key/value cache: pages of a fixed number of tokens from one pool, which a table gives to the rows of a batch.

A row of length l holds ceil(l / page) pages, so rows of different lengths waste less than a page each (Kwon et al.,
2023, PagedAttention). Page 0 is the null page: unallocated entries of a table point to it, and nothing is ever written
there. Keys and values are kept in the model's dtype, in another float dtype (float8_e4m3fn as it is: its range needs no
scales), or in int8 with a float32 scale for each token and head.

Over a mesh heads are cut over `tensor`, rows with their pages over the batch's axes, and each row's pages in turn over
`sequence`, whose devices merge their parts of the softmax (Dao et al., 2023, Flash-Decoding).

B batch, T new tokens, N heads, K kv heads, G = N / K heads that share one, H head_dim, L layers, P pages of the pool,
S slots of a page, M pages of a row at most, Q queries and C keys of a step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from nemoe_jax.errors import UserError
from nemoe_jax.kernels.attention.paged import KEYS, PAGE, QUERIES, KVPages, attend_pages, decode_kernels, row_by_row
from nemoe_jax.kernels.backend import target_platform
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.mesh import axes_size, batch_axes, spans_devices

_FEW = 16  # tokens of each sequence, as where guesses are checked


class KVCache(NamedTuple):
    """Keys and values of every layer, and how many tokens each row holds."""

    k: KVPages
    v: KVPages
    table_BM: jax.Array  # int32: the page of the pool (of the device's part of it) that holds a row's m-th page
    length_B: jax.Array  # int32


class LayerCache(NamedTuple):
    """The cache as one layer sees it while `num_new_tokens_B` tokens of each row, or all, are added."""

    k: KVPages
    v: KVPages
    table_BM: jax.Array
    layer: jax.Array  # int32: which one of the pool's
    num_new_tokens_B: jax.Array | None


def empty_cache(config: ModelConfig, batch: int, slots: int | Sequence[int], dtype: Any = jnp.bfloat16) -> KVCache:
    """A cache with room for `slots` tokens in each of `batch` rows, or for as many as each row is to have.

    Inside of `jit` it is laid over the ambient mesh.

    Raises:
        UserError: more slots than the model's context.
    """
    slots = [slots] * batch if isinstance(slots, int) else list(slots)
    if max(slots) > config.context:
        raise UserError(
            f"cache: expected at most the model's context of {config.context} slots a row, got {max(slots)}"
        )
    shards, cuts = division(config, batch)
    table_BM = np.zeros((batch, _table_width(max(slots), cuts)), np.int32)
    pages = 1  # of a device
    for first in range(0, batch, batch // shards):
        taken = 1
        for row in range(first, first + batch // shards):
            own = -(-slots[row] // (PAGE * cuts))  # of each of the sequence's devices
            table_BM[row, : own * cuts] = taken + np.arange(own * cuts) // cuts
            taken += own
        pages = max(pages, taken)
    return _cache(config, table_BM, pages, dtype)


def shared_cache(config: ModelConfig, batch: int, slots: int, pages: int, dtype: Any = jnp.bfloat16) -> KVCache:
    """A cache whose rows have no pages yet, and room for `slots` tokens each at most once they are given some.

    Inside of `jit` it is laid over the ambient mesh.

    Args:
        pages: of each device, with page 0. `division` says how many devices share the rows.
    """
    _, cuts = division(config, batch)
    return _cache(config, np.zeros((batch, _table_width(slots, cuts)), np.int32), pages, dtype)


def division(config: ModelConfig, batch: int) -> tuple[int, int]:
    """Into how many equal parts the ambient mesh cuts a batch's rows, and among how many devices each row's pages.

    Every part has a pool of its own, and each of a row's devices in turn holds one of its pages: in the table, under
    the same number.
    """
    rows, sequence, _ = _mesh_axes(batch, config.kv_heads)
    return axes_size(rows), axes_size(sequence)


def _table_width(slots: int, cuts: int) -> int:
    """Pages of a row: whole steps of all its devices."""
    step = KEYS // PAGE * cuts
    return -(-slots // (PAGE * step)) * step


def _cache(config: ModelConfig, table_BM: np.ndarray, pages: int, dtype: Any) -> KVCache:
    batch = len(table_BM)
    rows, sequence, tensor = _mesh_axes(batch, config.kv_heads)
    shape = (config.kv_heads, config.layers, pages * axes_size(rows) * axes_size(sequence), PAGE, config.head_dim)

    def pool() -> KVPages:
        scale = jnp.zeros(shape[:-1], jnp.float32) if dtype == jnp.int8 else None
        return jax.tree.map(_placed(_pool_place(rows, sequence, tensor)), KVPages(jnp.zeros(shape, dtype), scale))

    return KVCache(pool(), pool(), jnp.asarray(table_BM), jnp.zeros(batch, jnp.int32))


def update_and_attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    cache: LayerCache,
    window: int | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Writes new keys and values at their positions; each query sees its row's keys up to its own position.

    With a `window` it sees the last so many of them, its own included; what is before is not read, and stays.

    Returns (B, T, N, H) in q's dtype and the cache. The caller sees that there is room behind what it holds already.

    Raises:
        UserError: more new tokens than a row can have.
    """
    slots = cache.table_BM.shape[1] * PAGE
    if q_BTNH.shape[1] > slots:
        raise UserError(f"cache: {slots} slots a row are too few for {q_BTNH.shape[1]} tokens")
    rows, sequence, tensor = _mesh_axes(q_BTNH.shape[0], k_BTKH.shape[2])
    num_new_tokens_B = cache.num_new_tokens_B
    if num_new_tokens_B is None:
        num_new_tokens_B = jnp.full(q_BTNH.shape[:1], q_BTNH.shape[1], jnp.int32)
    mesh = jax.sharding.get_abstract_mesh()
    if not spans_devices(mesh):
        y_BTNH, k, v = _extend(q_BTNH, k_BTKH, v_BTKH, positions_BT, num_new_tokens_B, cache, window, ())
        return y_BTNH, cache._replace(k=k, v=v)
    heads, row = PartitionSpec(rows or None, None, tensor or None), PartitionSpec(rows or None)
    pool = _pool_place(rows, sequence, tensor)
    of_cache = LayerCache(pool, pool, row, PartitionSpec(), None if cache.num_new_tokens_B is None else row)  # type: ignore
    y_BTNH, k, v = jax.shard_map(
        functools.partial(_extend, window=window, sequence=sequence),
        in_specs=(heads, heads, heads, row, row, of_cache),
        out_specs=(heads, pool, pool),
        check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKH, positions_BT, num_new_tokens_B, cache)
    return y_BTNH, cache._replace(k=k, v=v)


def zero_pages(pools: tuple[KVPages, KVPages], pages_M: jax.Array, here_B: jax.Array) -> tuple[KVPages, KVPages]:
    """Zeros in pages of keys and values, in place.

    Args:
        pages_M: int32, their numbers in the table; beyond the pool: none.
        here_B: bool, one for each part of the rows (see `division`): whose pages are meant.
    """

    def of_device(pools, pages_M, here_B):
        def page(number, pools):
            place = jnp.where(here_B[0], pages_M[number], pools[0].pool.shape[2])
            return jax.tree.map(lambda array: array.at[:, :, place].set(0, mode="drop"), pools)

        return lax.fori_loop(0, len(pages_M), page, pools)  # one by one: for all at once, TPUs would copy the pool

    return _of_each_device(of_device, pools, pages_M, here_B)


def copy_page(
    pools: tuple[KVPages, KVPages], source: jax.Array, target: jax.Array, here_B: jax.Array
) -> tuple[KVPages, KVPages]:
    """A copy of a page of keys and values in place of another one.

    Args:
        source, target: int32 scalars, their numbers in the table.
        here_B: as for `zero_pages`.
    """

    def of_device(pools, numbers, here_B):
        source, target = numbers

        def copied(array):
            page = lax.dynamic_index_in_dim(array, source, 2)
            old = lax.dynamic_index_in_dim(array, target, 2)
            return lax.dynamic_update_index_in_dim(array, jnp.where(here_B[0], page, old), target, 2)

        return jax.tree.map(copied, pools)

    return _of_each_device(of_device, pools, (source, target), here_B)


def _of_each_device(of_device: Callable[..., Any], pools: Any, numbers: Any, here_B: jax.Array) -> Any:
    """A function of each device's own pools, of page numbers, and of whether its part of the rows is meant, (1,)."""
    mesh = jax.sharding.get_abstract_mesh()
    if not spans_devices(mesh):
        return of_device(pools, numbers, here_B)
    rows, sequence, tensor = _mesh_axes(len(here_B), pools[0].pool.shape[0])
    pool = _pool_place(rows, sequence, tensor)
    places = (pool, PartitionSpec(), PartitionSpec(rows or None))
    return jax.shard_map(of_device, in_specs=places, out_specs=pool, check_vma=False)(pools, numbers, here_B)


def _mesh_axes(batch: int, kv_heads: int) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The axes of the ambient mesh that cut rows, each row's pages, and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if not spans_devices(mesh):
        return (), (), ()

    def cuts(name: str) -> bool:
        return mesh.shape.get(name, 1) > 1

    tensor = ("tensor",) if cuts("tensor") and kv_heads % mesh.shape["tensor"] == 0 else ()
    return batch_axes(mesh.shape, batch), ("sequence",) if cuts("sequence") else (), tensor


def _pool_place(rows: tuple[str, ...], sequence: tuple[str, ...], tensor: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(tensor or None, None, (*rows, *sequence) or None)


def _placed(place: PartitionSpec) -> Any:
    if jax.sharding.get_abstract_mesh().empty:
        return lambda array: array
    return lambda array: lax.with_sharding_constraint(array, place)


def _extend(q_BTNH, k_BTKH, v_BTKH, positions_BT, num_new_tokens_B, cache, window, sequence):
    """`update_and_attend` on one device, with its heads, sequences and pages."""
    cuts = axes_size(sequence)
    part = lax.axis_index(sequence) if sequence else 0
    table_BM = cache.table_BM.reshape(len(cache.table_BM), -1, cuts)[:, :, part]
    counts_B1 = num_new_tokens_B[:, None]
    page_BT, slot_BT = positions_BT // PAGE, positions_BT % PAGE
    mine_BT = (jnp.arange(positions_BT.shape[1]) < counts_B1) & (page_BT % cuts == part)
    held_BT = jnp.take_along_axis(table_BM, page_BT // cuts, axis=1, mode="clip")
    mine_BT &= (page_BT // cuts < table_BM.shape[1]) & (held_BT > 0)  # what a row has no room for is lost
    target_BT = jnp.where(mine_BT, held_BT, cache.k.pool.shape[2])  # beyond the pool: dropped
    k = _write(cache.k, k_BTKH, cache.layer, target_BT, slot_BT)
    v = _write(cache.v, v_BTKH, cache.layer, target_BT, slot_BT)

    def attend(queries):
        q, positions = queries
        return attend_pages(q, positions, k, v, table_BM, cache.layer, window, pages, part, sequence)

    # a query that does not count sees its row's first key, so that it makes no work
    seen_BT = jnp.where(jnp.arange(positions_BT.shape[1]) < counts_B1, positions_BT, 0)
    batch, length = positions_BT.shape
    pages = KEYS // PAGE
    if target_platform() == "cpu":  # few new tokens seldom have many before them, and a step costs what it computes
        pages = next(few for few in (1, 2, pages) if few == pages or length <= few * PAGE)
    if target_platform() == "cpu" and 1 < length <= _FEW and not sequence:
        return row_by_row(q_BTNH, seen_BT, k, v, table_BM, cache.layer, window), k, v
    if length == 1 and not sequence:
        ways = decode_kernels(q_BTNH, k, window)
        given = (q_BTNH, seen_BT, k, v, table_BM, cache.layer)
        return lax.platform_dependent(*given, **ways, default=lambda *given: attend(given[:2])), k, v
    if length <= QUERIES:
        return attend((q_BTNH, seen_BT)), k, v
    fill = -length % QUERIES
    steps = (
        jnp.pad(x, ((0, 0), (0, fill), *[(0, 0)] * (x.ndim - 2))).reshape(batch, -1, QUERIES, *x.shape[2:])
        for x in (q_BTNH, seen_BT)
    )
    y = lax.map(attend, tuple(x.swapaxes(0, 1) for x in steps)).swapaxes(0, 1)
    return y.reshape(batch, length + fill, *y.shape[3:])[:, :length], k, v


def _write(pages: KVPages, new_BTKH: jax.Array, layer: jax.Array, page_BT: jax.Array, slot_BT: jax.Array) -> KVPages:
    scale = pages.scale
    if scale is not None:
        new_BTKH, new_scale_BTK = quantize(new_BTKH)
        scale = scale.at[:, layer, page_BT, slot_BT].set(new_scale_BTK.transpose(2, 0, 1), mode="drop")
    elif pages.pool.dtype == jnp.float8_e4m3fn:
        new_BTKH = new_BTKH.clip(-448, 448)  # what is larger becomes NaN
    new = new_BTKH.astype(pages.pool.dtype).transpose(2, 0, 1, 3)
    heads: Any = slice(None)
    if target_platform() == "tpu" and len(new) > 1 and new.shape[2] == 1:
        # one by one: a TPU would lay the whole pool out anew for updates of several heads, and back
        heads = jnp.arange(len(new))[:, None, None]
    return KVPages(pages.pool.at[heads, layer, page_BT, slot_BT].set(new, mode="drop"), scale)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 (…, H) and float32 scales (…) whose product is x, to half a scale; the largest of each H gets ±127."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    return jnp.round(x / jnp.maximum(scale, 1e-30)[..., None]).astype(jnp.int8), scale
