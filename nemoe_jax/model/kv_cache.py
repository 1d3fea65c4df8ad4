"""The key/value cache: pages of a fixed number of tokens from one pool, which a table gives to the rows of a batch.

A row of length l holds ceil(l / page) pages, so rows of different lengths waste less than a page each (Kwon et al.,
2023, PagedAttention). Page 0 is nobody's: a table has it where a row has no page, and nothing is ever written there.
Keys and values are kept in the model's dtype, in another float dtype (float8_e4m3fn as it is: its range needs no
scales), or in int8 with a float32 scale for each token and head.

Over a mesh heads are cut over `tensor`, rows with their pages over the batch's axes, and each row's pages in turn over
`sequence`, whose devices merge their parts of the softmax (Dao et al., 2023, Flash-Decoding).

B batch, T new tokens, N heads, K kv heads, G = N / K heads that share one, H head_dim, L layers, P pages of the pool,
S slots of a page, M pages of a row at most, Q queries and C keys of a step.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.sharding import PartitionSpec

from nemoe_jax.errors import UserError
from nemoe_jax.kernels.attention.gpu import gpu_paged_attention
from nemoe_jax.kernels.backend import platform
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.sharding import batch_axes

PAGE = 128  # tokens: as many as a TPU's lanes, or it would copy all scales of an int8 cache in every layer
KEYS = 512  # keys of a step: how many scores a query has at a time; tables have whole steps
KEYS_ON_TPU = 8192  # of a step with one query, without the kernel: a step costs as much as some thousand keys
QUERIES = 512  # queries of a step
_HIDDEN = -1e30  # finite, so that a row that sees nothing yet gives no NaN


class Pages(NamedTuple):
    """Keys or values of all layers."""

    pool: jax.Array  # (K, L, P, S, H)
    scale: jax.Array | None  # float32 (K, L, P, S), for int8


class Cache(NamedTuple):
    """Keys and values of every layer, and how many tokens each row holds."""

    k: Pages
    v: Pages
    table_BM: jax.Array  # int32: the page of the pool (of the device's part of it) that holds a row's m-th page
    length_B: jax.Array  # int32


class LayerCache(NamedTuple):
    """The cache as one layer sees it while `counts_B` tokens of each row, or all, are added."""

    k: Pages
    v: Pages
    table_BM: jax.Array
    layer: jax.Array  # int32: which one of the pool's
    counts_B: jax.Array | None


def empty_cache(config: ModelConfig, batch: int, slots: int | Sequence[int], dtype: Any = jnp.bfloat16) -> Cache:
    """A cache with room for `slots` tokens in each of `batch` rows, or for as many as each row is to have.

    Inside of `jit` it is laid over the ambient mesh.

    Raises:
        UserError: more slots than the model's context.
    """
    slots = [slots] * batch if isinstance(slots, int) else list(slots)
    if max(slots) > config.context:
        raise UserError(f"cache: wanted at most the model's context of {config.context} slots a row, got {max(slots)}")
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


def shared_cache(config: ModelConfig, batch: int, slots: int, pages: int, dtype: Any = jnp.bfloat16) -> Cache:
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
    return _size(rows), _size(sequence)


def _table_width(slots: int, cuts: int) -> int:
    """Pages of a row: whole steps of all its devices."""
    step = KEYS // PAGE * cuts
    return -(-slots // (PAGE * step)) * step


def _cache(config: ModelConfig, table_BM: np.ndarray, pages: int, dtype: Any) -> Cache:
    batch = len(table_BM)
    rows, sequence, tensor = _mesh_axes(batch, config.kv_heads)
    shape = (config.kv_heads, config.layers, pages * _size(rows) * _size(sequence), PAGE, config.head_dim)

    def pool() -> Pages:
        scale = jnp.zeros(shape[:-1], jnp.float32) if dtype == jnp.int8 else None
        return jax.tree.map(_placed(_pool_place(rows, sequence, tensor)), Pages(jnp.zeros(shape, dtype), scale))

    return Cache(pool(), pool(), jnp.asarray(table_BM), jnp.zeros(batch, jnp.int32))


def extend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array, cache: LayerCache
) -> tuple[jax.Array, LayerCache]:
    """Writes new keys and values at their positions; each query sees its row's keys up to its own position.

    Returns (B, T, N, H) in q's dtype and the cache. The caller sees that there is room behind what it holds already.

    Raises:
        UserError: more new tokens than a row can have.
    """
    slots = cache.table_BM.shape[1] * PAGE
    if q_BTNH.shape[1] > slots:
        raise UserError(f"cache: {slots} slots a row are too few for {q_BTNH.shape[1]} tokens")
    rows, sequence, tensor = _mesh_axes(q_BTNH.shape[0], k_BTKH.shape[2])
    counts_B = cache.counts_B
    if counts_B is None:
        counts_B = jnp.full(q_BTNH.shape[:1], q_BTNH.shape[1], jnp.int32)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        y_BTNH, k, v = _extend(q_BTNH, k_BTKH, v_BTKH, positions_BT, counts_B, cache, ())
        return y_BTNH, cache._replace(k=k, v=v)
    heads, row = PartitionSpec(rows or None, None, tensor or None), PartitionSpec(rows or None)
    pool = _pool_place(rows, sequence, tensor)
    of_cache = LayerCache(pool, pool, row, PartitionSpec(), None if cache.counts_B is None else row)  # type: ignore
    y_BTNH, k, v = jax.shard_map(
        functools.partial(_extend, sequence=sequence),
        in_specs=(heads, heads, heads, row, row, of_cache),
        out_specs=(heads, pool, pool),
        check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKH, positions_BT, counts_B, cache)
    return y_BTNH, cache._replace(k=k, v=v)


def wipe(pools: tuple[Pages, Pages], pages_M: jax.Array, here_B: jax.Array) -> tuple[Pages, Pages]:
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

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return of_device(pools, pages_M, here_B)
    rows, sequence, tensor = _mesh_axes(len(here_B), pools[0].pool.shape[0])
    pool = _pool_place(rows, sequence, tensor)
    places = (pool, PartitionSpec(), PartitionSpec(rows or None))
    return jax.shard_map(of_device, in_specs=places, out_specs=pool, check_vma=False)(pools, pages_M, here_B)


def _mesh_axes(batch: int, kv_heads: int) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The axes of the ambient mesh that cut rows, each row's pages, and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return (), (), ()

    def cuts(name: str) -> bool:
        return mesh.shape.get(name, 1) > 1

    tensor = ("tensor",) if cuts("tensor") and kv_heads % mesh.shape["tensor"] == 0 else ()
    return batch_axes(mesh.shape, batch), ("sequence",) if cuts("sequence") else (), tensor


def _size(axes: tuple[str, ...]) -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in axes)


def _pool_place(rows: tuple[str, ...], sequence: tuple[str, ...], tensor: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(tensor or None, None, (*rows, *sequence) or None)


def _placed(place: PartitionSpec) -> Any:
    if jax.sharding.get_abstract_mesh().empty:
        return lambda array: array
    return lambda array: lax.with_sharding_constraint(array, place)


def _extend(q_BTNH, k_BTKH, v_BTKH, positions_BT, counts_B, cache, sequence):
    """`extend` on one device, with its heads, rows and pages."""
    cuts = _size(sequence)
    part = lax.axis_index(sequence) if sequence else 0
    table_BM = cache.table_BM.reshape(len(cache.table_BM), -1, cuts)[:, :, part]
    counts_B1 = counts_B[:, None]
    page_BT, slot_BT = positions_BT // PAGE, positions_BT % PAGE
    mine_BT = (jnp.arange(positions_BT.shape[1]) < counts_B1) & (page_BT % cuts == part)
    held_BT = jnp.take_along_axis(table_BM, page_BT // cuts, axis=1, mode="clip")
    mine_BT &= (page_BT // cuts < table_BM.shape[1]) & (held_BT > 0)  # what a row has no room for is lost
    target_BT = jnp.where(mine_BT, held_BT, cache.k.pool.shape[2])  # beyond the pool: dropped
    k = _write(cache.k, k_BTKH, cache.layer, target_BT, slot_BT)
    v = _write(cache.v, v_BTKH, cache.layer, target_BT, slot_BT)

    def attend(queries):
        q, positions = queries
        return _attend(q, positions, k, v, table_BM, cache.layer, pages, part, sequence)

    # a query that does not count sees its row's first key, so that it makes no work
    seen_BT = jnp.where(jnp.arange(positions_BT.shape[1]) < counts_B1, positions_BT, 0)
    batch, length = positions_BT.shape
    pages = KEYS // PAGE
    if platform() == "cpu":  # where few new tokens seldom have many before them, and a step costs what it computes
        pages = next(few for few in (1, 2, pages) if few == pages or length <= few * PAGE)
    if length == 1 and not sequence:
        ways = _ways_to_decode(q_BTNH, k)
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


def _write(pages: Pages, new_BTKH: jax.Array, layer: jax.Array, page_BT: jax.Array, slot_BT: jax.Array) -> Pages:
    scale = pages.scale
    if scale is not None:
        new_BTKH, new_scale_BTK = quantise(new_BTKH)
        scale = scale.at[:, layer, page_BT, slot_BT].set(new_scale_BTK.transpose(2, 0, 1), mode="drop")
    elif pages.pool.dtype == jnp.float8_e4m3fn:
        new_BTKH = new_BTKH.clip(-448, 448)  # what is larger becomes NaN
    new = new_BTKH.astype(pages.pool.dtype).transpose(2, 0, 1, 3)
    return Pages(pages.pool.at[:, layer, page_BT, slot_BT].set(new, mode="drop"), scale)


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 (…, H) and float32 scales (…) whose product is x, to half a scale; the largest of each H gets ±127."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    return jnp.round(x / jnp.maximum(scale, 1e-30)[..., None]).astype(jnp.int8), scale


def _attend(q_BQNH, positions_BQ, k: Pages, v: Pages, table_BM, layer, pages=1, part=0, sequence=()):
    """Attention of some queries over their rows' pages, so many a step, with a running maximum and sum."""
    batch, queries, heads, width = q_BQNH.shape
    kv_heads, cuts, dtype = k.pool.shape[0], _size(sequence), q_BQNH.dtype
    q = (q_BQNH.astype(jnp.float32) * width**-0.5).astype(dtype)
    q = q.reshape(batch, queries, kv_heads, -1, width).transpose(2, 0, 3, 1, 4).reshape(kv_heads, batch, -1, width)
    slots_C = (jnp.arange(pages)[:, None] * cuts * PAGE + jnp.arange(PAGE)).reshape(-1)
    last_KBGQ = jnp.broadcast_to(positions_BQ[:, None], (batch, heads // kv_heads, queries)).reshape(1, batch, -1, 1)

    def read(array, page_BP):
        if page_BP.size == 1:  # on CPU a slice is read several times as fast as what is gathered
            start = (0, layer, page_BP[0, 0], *[0] * (array.ndim - 3))
            return lax.dynamic_slice(array, start, (kv_heads, 1, 1, *array.shape[3:]))
        return array[:, layer, page_BP]

    def of_step(held: Pages, page_BP):
        array = read(held.pool, page_BP).reshape(kv_heads, batch, -1, width)
        scale = None if held.scale is None else read(held.scale, page_BP).reshape(kv_heads, batch, 1, -1)
        return array.astype(dtype), scale

    def step(number, carry):
        largest, total, y = carry
        page_BP = lax.dynamic_slice_in_dim(table_BM, number * pages, pages, 1)
        (keys, k_scale), (values, v_scale) = of_step(k, page_BP), of_step(v, page_BP)
        scores = jnp.einsum("kbqh,kbch->kbqc", q, keys, preferred_element_type=jnp.float32)
        if k_scale is not None:
            scores *= k_scale
        position_C = slots_C + (number * pages * cuts + part) * PAGE
        scores = jnp.where(position_C <= last_KBGQ, scores, _HIDDEN)
        new_largest = jnp.maximum(largest, scores.max(-1, keepdims=True))
        kept, weights = jnp.exp(largest - new_largest), jnp.exp(scores - new_largest)
        total = total * kept + weights.sum(-1, keepdims=True)
        if v_scale is not None:
            weights *= v_scale
        part_y = jnp.einsum("kbqc,kbch->kbqh", weights.astype(dtype), values, preferred_element_type=jnp.float32)
        return new_largest, total, y * kept + part_y

    steps = jnp.max(positions_BQ) // (pages * PAGE * cuts) + 1
    nothing = jnp.full((*q.shape[:3], 1), _HIDDEN), jnp.zeros((*q.shape[:3], 1)), jnp.zeros(q.shape)
    largest, total, y = lax.fori_loop(0, steps, step, nothing)
    if sequence:
        share = jnp.exp(largest - lax.pmax(largest, sequence))
        total, y = (lax.psum(x * share, sequence) for x in (total, y))
    y = (y / total).astype(dtype).reshape(kv_heads, batch, -1, queries, width)
    return y.transpose(1, 3, 0, 2, 4).reshape(q_BQNH.shape)


def _ways_to_decode(q_B1NH: jax.Array, k: Pages) -> dict[str, Any]:
    """By platform, what attends for one query a row better than `_attend` for all rows: `_attend`'s arguments."""
    ways: dict[str, Any] = {"cpu": _row_by_row, "tpu": _in_long_steps}
    width, dtypes = q_B1NH.shape[3], {q_B1NH.dtype, k.pool.dtype}
    if k.scale is None and width % 128 == 0 and jnp.dtype(jnp.float16) not in dtypes:
        ways["tpu"] = _kernel_for_tpus
    # it takes a power of two, and adds up in q's dtype, which would overflow in float16
    if q_B1NH.dtype == jnp.bfloat16 and k.pool.dtype in (jnp.bfloat16, jnp.int8) and width & (width - 1) == 0:
        ways["cuda"] = _kernel_for_gpus
    return ways


def _row_by_row(q_B1NH, positions_B1, k, v, table_BM, layer):
    """Each row goes over its own pages alone, one at a time."""

    def attend(row):
        q, positions, table = (x[None] for x in row)
        return _attend(q, positions, k, v, table, layer)[0]

    return lax.map(attend, (q_B1NH, positions_B1, table_BM))


def _in_long_steps(q_B1NH, positions_B1, k, v, table_BM, layer):
    """As many of `KEYS_ON_TPU` as divide the rows' room."""
    return _attend(q_B1NH, positions_B1, k, v, table_BM, layer, math.gcd(table_BM.shape[1], KEYS_ON_TPU // PAGE))


def _kernel_for_tpus(q_B1NH, positions_B1, k, v, table_BM, layer):
    """JAX's Pallas kernel for TPUs, which reads the pages where they lie."""
    q_BNH = (q_B1NH[:, 0].astype(jnp.float32) * q_B1NH.shape[3] ** -0.5).astype(q_B1NH.dtype)
    pages = table_BM + layer * k.pool.shape[2]
    lengths_B = positions_B1[:, 0] + 1
    y_BNH = paged_attention(
        q_BNH, _all_pages(k.pool), _all_pages(v.pool), lengths_B, pages, pages_per_compute_block=KEYS // PAGE
    )
    return y_BNH[:, None].astype(q_B1NH.dtype)


def _kernel_for_gpus(q_B1NH, positions_B1, k, v, table_BM, layer):
    """JAX's Pallas kernel for NVIDIA GPUs."""
    pages = table_BM + layer * k.pool.shape[2]
    pools = _all_pages(k.pool), _all_pages(v.pool)
    scales = () if k.scale is None else (_all_pages(k.scale), _all_pages(v.scale))
    return gpu_paged_attention(q_B1NH[:, 0], *pools, positions_B1[:, 0] + 1, pages, *scales)[:, None]


def _all_pages(array: jax.Array) -> jax.Array:
    """(K, L, P, S, …) -> (K, L·P, S, …)."""
    return array.reshape(array.shape[0], -1, *array.shape[3:])
