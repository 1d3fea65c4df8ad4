"""Attention over the pages of a key/value cache: in blocks of keys everywhere, and a kernel a platform for decoding.

`attend_pages` takes any number of queries a sequence and keeps a running maximum and sum over blocks of keys; on
several devices along `sequence` each adds up its own pages and they merge (Flash-Decoding). For one query a sequence
`decode_kernels` gives what is faster: on CPU each sequence alone, on TPUs and NVIDIA GPUs JAX's own Pallas kernels.

B sequences, Q queries, N heads, K kv heads, G = N / K, H head_dim, L layers, P pages of the pool, S slots of a page, M
pages of a sequence, C keys of a step.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nemoe_jax.kernels.attention.gpu import pallas_kernel
from nemoe_jax.spec.mesh import axes_size

PAGE = 128  # tokens: as many as a TPU's lanes, or it would copy all scales of an int8 cache in every layer
KEYS = 512  # keys of a step: how many scores a query has at a time; tables have whole steps
KEYS_ON_TPU = 8192  # of a step with one query, without the kernel: a step costs as much as some thousand keys
QUERIES = 512  # queries of a step
_HIDDEN = -1e30  # finite, so that a query that sees nothing yet gives no NaN
_PAGES = 2  # pages that a program reads at a time
_SPLITS = 32  # programs at most that share a sequence's keys


class KVPages(NamedTuple):
    """Keys or values of all layers."""

    pool: jax.Array  # (K, L, P, S, H)
    scale: jax.Array | None  # float32 (K, L, P, S), for int8


def attend_pages(
    q_BQNH, positions_BQ, k: KVPages, v: KVPages, table_BM, layer, window=None, pages=1, part=0, sequence=()
):
    """Attention of some queries over their sequences' pages, (B, Q, N, H), `pages` of them a step.

    Args:
        positions_BQ: of the queries; a query sees the keys up to its own position.
        table_BM: the pages of each sequence, 0 where there is none.
        window: how many keys back a query sees, itself included.
        part: which of the devices along `sequence` this one is: page m is on device m modulo their number.
    """
    batch, queries, heads, width = q_BQNH.shape
    kv_heads, cuts, dtype = k.pool.shape[0], axes_size(sequence), q_BQNH.dtype
    q = (q_BQNH.astype(jnp.float32) * width**-0.5).astype(dtype)
    q = q.reshape(batch, queries, kv_heads, -1, width).transpose(2, 0, 3, 1, 4).reshape(kv_heads, batch, -1, width)
    slots_C = (jnp.arange(pages)[:, None] * cuts * PAGE + jnp.arange(PAGE)).reshape(-1)
    last_KBGQ = jnp.broadcast_to(positions_BQ[:, None], (batch, heads // kv_heads, queries)).reshape(1, batch, -1, 1)

    def read(array, page_BP):
        if page_BP.size == 1:  # on CPU a slice is read several times as fast as what is gathered
            start = (0, layer, page_BP[0, 0], *[0] * (array.ndim - 3))
            return lax.dynamic_slice(array, start, (kv_heads, 1, 1, *array.shape[3:]))
        return array[:, layer, page_BP]

    def of_step(held: KVPages, page_BP):
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
        seen = position_C <= last_KBGQ
        if window is not None:
            seen &= position_C > last_KBGQ - window
        scores = jnp.where(seen, scores, _HIDDEN)
        new_largest = jnp.maximum(largest, scores.max(-1, keepdims=True))
        kept, weights = jnp.exp(largest - new_largest), jnp.exp(scores - new_largest)
        total = total * kept + weights.sum(-1, keepdims=True)
        if v_scale is not None:
            weights *= v_scale
        part_y = jnp.einsum("kbqc,kbch->kbqh", weights.astype(dtype), values, preferred_element_type=jnp.float32)
        return new_largest, total, y * kept + part_y

    steps = jnp.max(positions_BQ) // (pages * PAGE * cuts) + 1
    nothing = jnp.full((*q.shape[:3], 1), _HIDDEN), jnp.zeros((*q.shape[:3], 1)), jnp.zeros(q.shape)
    first = 0 if window is None else jnp.maximum(jnp.min(positions_BQ) - window + 1, 0) // (pages * PAGE * cuts)
    largest, total, y = lax.fori_loop(first, steps, step, nothing)
    if sequence:
        share = jnp.exp(largest - lax.pmax(largest, sequence))
        total, y = (lax.psum(x * share, sequence) for x in (total, y))
    y = (y / total).astype(dtype).reshape(kv_heads, batch, -1, queries, width)
    return y.transpose(1, 3, 0, 2, 4).reshape(q_BQNH.shape)


def decode_kernels(q_B1NH: jax.Array, k: KVPages, window: int | None = None) -> dict[str, Any]:
    """By platform, what is faster than `attend_pages` for one query a sequence; it takes `attend_pages`'s arguments."""
    ways: dict[str, Any] = {"cpu": row_by_row, "tpu": _in_long_steps}
    if window is not None:  # which the kernels do not know
        return {platform: functools.partial(way, window=window) for platform, way in ways.items()}
    width, dtypes = q_B1NH.shape[3], {q_B1NH.dtype, k.pool.dtype}
    if k.scale is None and width % 128 == 0 and jnp.dtype(jnp.float16) not in dtypes:
        ways["tpu"] = _kernel_for_tpus
    # it takes a power of two, and adds up in q's dtype, which would overflow in float16
    if q_B1NH.dtype == jnp.bfloat16 and k.pool.dtype in (jnp.bfloat16, jnp.int8) and width & (width - 1) == 0:
        ways["cuda"] = _kernel_for_gpus
    return ways


def row_by_row(q_BQNH, positions_BQ, k, v, table_BM, layer, window=None):
    """Each sequence goes over its own pages alone, one at a time: faster on CPU for few queries."""

    def attend(row):
        q, positions, table = (x[None] for x in row)
        return attend_pages(q, positions, k, v, table, layer, window)[0]

    return lax.map(attend, (q_BQNH, positions_BQ, table_BM))


def _in_long_steps(q_B1NH, positions_B1, k, v, table_BM, layer, window=None):
    """As many of `KEYS_ON_TPU` as divide a sequence's pages."""
    pages = math.gcd(table_BM.shape[1], KEYS_ON_TPU // PAGE)
    return attend_pages(q_B1NH, positions_B1, k, v, table_BM, layer, window, pages)


def _kernel_for_tpus(q_B1NH, positions_B1, k, v, table_BM, layer):
    """JAX's Pallas kernel for TPUs, which reads the pages in place."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention  # half a second

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


def gpu_paged_attention(
    q_BNH: jax.Array,
    k_KPSH: jax.Array,
    v_KPSH: jax.Array,
    length_B: jax.Array,
    table_BM: jax.Array,
    k_scale_KPS: jax.Array | None = None,
    v_scale_KPS: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of one query a sequence over its first `length_B` tokens, (B, N, H) in q's dtype; scaled by H^-1/2.

    Args:
        length_B: int32, one at least.
        table_BM: int32: the page that holds a sequence's m-th page.
        k_scale_KPS: of int8 keys; with `v_scale_KPS`.
        interpret: runs it on any platform, slowly.
    """
    splits = min(table_BM.shape[1] & -table_BM.shape[1], _SPLITS)
    of_program = table_BM.shape[1] // splits
    return pallas_kernel("paged_attention").paged_attention(
        (q_BNH.astype(jnp.float32) * q_BNH.shape[-1] ** -0.5).astype(q_BNH.dtype),
        k_KPSH,
        v_KPSH,
        table_BM,
        length_B,
        k_scale_KPS,
        v_scale_KPS,
        k_splits=splits,
        pages_per_compute_block=min(of_program & -of_program, _PAGES),
        num_warps=4,
        interpret=interpret,
    )
