import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from nemoe_jax.errors import UserError
from nemoe_jax.kernels.attention import paged
from nemoe_jax.kernels.attention.paged import KEYS, PAGE, attend_pages, decode_kernels
from nemoe_jax.model import kv_cache
from nemoe_jax.model.kv_cache import (
    LayerCache,
    division,
    empty_cache,
    quantize,
    shared_cache,
    update_and_attend,
    zero_pages,
)
from nemoe_jax.model.transformer import forward, hidden_states
from nemoe_jax.spec import schema
from nemoe_jax.spec.mesh import make_mesh
from tests.kernels import test_attention
from tests.support.configs import DENSE

LONG = dataclasses.replace(DENSE, context=4096, layers=2)
plain = jax.jit(test_attention.plain, static_argnums=4)


def inputs(batch, length, config=LONG, seed=0):
    random = np.random.default_rng(seed)
    heads = config.heads, config.kv_heads, config.kv_heads
    shapes = [(batch, length, many, config.head_dim) for many in heads]
    return [jax.device_put(np.float32(random.normal(size=shape))) for shape in shapes]


def attend(q, k, v, chunks, dtype=jnp.float32, slots=None, layer=1, config=LONG, window=None):
    """What `extend` makes of the tokens, given to it in chunks, in one layer of a cache."""
    batch, length = q.shape[:2]

    @jax.jit
    def run(q, k, v):
        cache = empty_cache(config, batch, slots or length, dtype)
        held = LayerCache(cache.k, cache.v, cache.table_BM, jnp.int32(layer), None)
        ys, start = [], 0
        for size in chunks:
            now = slice(start, start + size)
            positions = jnp.broadcast_to(jnp.arange(length)[now], (batch, size))
            y, held = update_and_attend(q[:, now], k[:, now], v[:, now], positions, held, window)
            ys.append(y)
            start += size
        return jnp.concatenate(ys, axis=1), held

    return run(q, k, v)


@pytest.mark.parametrize(
    ("length", "chunks"),
    [(9, [9]), (130, [63, 1, 1, 65]), (700, [3, 697]), (1100, [1030, 1, 69])],
    ids=["one chunk", "across a page", "a long chunk behind a short one", "more keys than a step"],
)
def test_attention_in_chunks_equals_plain_attention(length, chunks):
    q, k, v = inputs(2, length)
    y, held = attend(q, k, v, chunks)
    np.testing.assert_allclose(y, plain(q, k, v, None), atol=2e-5)
    assert not held.k.pool[:, 0].any()  # the other layer's


@pytest.mark.parametrize("window", [2, PAGE, 600])
def test_a_window_hides_the_keys_before_it(window):
    q, k, v = inputs(2, 1100)
    y, _ = attend(q, k, v, [1030, 1, 69], window=window)
    np.testing.assert_allclose(y, plain(q, k, v, None, window), atol=2e-5)
    held = shared_cache(LONG, 2, 1100, 30, jnp.float32)
    assert {*decode_kernels(q[:, :1], held.k, window)} == {"cpu", "tpu"}  # the kernels of GPUs know no window


def test_rows_take_whole_pages_of_their_own():
    lengths = [1, PAGE, PAGE + 1, 5 * PAGE - 3]
    cache = empty_cache(LONG, 4, lengths)
    pages = [-(-length // PAGE) for length in lengths]
    assert cache.k.pool.shape == (LONG.kv_heads, LONG.layers, 1 + sum(pages), PAGE, LONG.head_dim)
    taken = [page for row, many in enumerate(pages) for page in cache.table_BM[row, :many].tolist()]
    assert sorted(taken) == list(range(1, 1 + sum(pages)))  # page 0 is nobody's


def test_rows_write_in_the_pages_that_they_are_given_and_nowhere_else():
    q, k, v = inputs(3, 200)
    cache = shared_cache(LONG, 3, 300, 6, jnp.float32)
    assert division(LONG, 3) == (1, 1) and not cache.table_BM.any()
    table_BM = cache.table_BM.at[0, :2].set(jnp.array([5, 2])).at[2, :2].set(jnp.array([1, 4]))
    held = LayerCache(cache.k, cache.v, table_BM, jnp.int32(1), None)
    y, held = jax.jit(update_and_attend)(q, k, v, jnp.broadcast_to(jnp.arange(200), (3, 200)), held)
    expected = plain(q, k, v, None)
    np.testing.assert_allclose(y[0], expected[0], atol=2e-5)
    np.testing.assert_allclose(y[2], expected[2], atol=2e-5)
    assert held.k.pool.any(axis=(0, 1, 3, 4)).tolist() == [False, True, True, False, True, True]  # page 0 is nobody's


def test_what_a_row_has_no_room_for_takes_no_other_rows_place():
    q, k, v = inputs(2, 200)
    y, _ = attend(q, k, v, [200], slots=[200, PAGE])
    np.testing.assert_allclose(y[0], plain(q, k, v, None)[0], atol=2e-5)
    np.testing.assert_allclose(y[1, :PAGE], plain(q, k, v, None)[1, :PAGE], atol=2e-5)


@pytest.mark.parametrize(
    "sizes",
    [{"tensor": 2, "sequence": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"sequence": 8}, {"tensor": 8}],
    ids=lambda sizes: ",".join(sizes),
)
def test_a_mesh_gives_what_one_device_gives(sizes):
    """Tensor 8 does not divide two heads: then each device holds both."""
    q, k, v = inputs(4, 300)
    slots = [300, 301, 640, 1300]
    with jax.set_mesh(make_mesh(sizes)):
        y, held = attend(q, k, v, [257, 1, 42], slots=slots)
        parts = {shard.data.shape for shard in held.k.pool.addressable_shards}
    np.testing.assert_allclose(y, plain(q, k, v, None), atol=2e-5)
    cut = sizes.get("tensor", 1) if sizes.get("tensor", 1) <= 2 else 1
    cut *= sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("sequence", 1)
    assert len(parts) == 1
    assert np.prod(parts.pop()) * cut == held.k.pool.size


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "sequence": 2, "tensor": 2}, {"expert": 4, "tensor": 2}], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_pages_of_one_part_are_wiped_and_nothing_else(sizes, dtype):
    batch, pages = 4, 6
    with jax.set_mesh(make_mesh(sizes)) if sizes else contextlib.nullcontext():
        parts, cuts = division(LONG, batch)
        cache = jax.jit(lambda: shared_cache(LONG, batch, 4 * PAGE, pages, dtype))()
        full = jax.tree.map(lambda array: array + jnp.ones((), array.dtype), (cache.k, cache.v))
        wiped = jax.jit(zero_pages)(full, jnp.asarray([2, 5, 2**31 - 1]), jnp.arange(parts) == parts - 1)
    for array in jax.tree.leaves(wiped):
        expected = np.ones(array.shape)
        of_part = expected.reshape(*array.shape[:2], parts, cuts, pages, *array.shape[3:])
        of_part[:, :, -1, :, [2, 5]] = 0
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.004), ("int8", 0.01), ("float8_e4m3fn", 0.05)])
def test_the_error_of_kept_keys_and_values(dtype, limit):
    """Root mean square, relative; and above a quarter of the limit, so that the limit says something."""
    q, k, v = inputs(2, 200)
    expected = plain(q, k, v, None)
    error = np.sqrt(np.mean((attend(q, k, v, [200], jnp.dtype(dtype))[0] - expected) ** 2) / np.mean(expected**2))
    assert limit / 4 < error < limit


def test_float8_clips_what_it_cannot_hold():
    q, k, v = inputs(1, 3)
    y, _ = attend(q, k, v * 1e4, [3], jnp.float8_e4m3fn)
    assert np.isfinite(y).all()


def test_int8_with_its_scales_is_within_half_a_step():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 16)), jnp.float32).at[3].set(0)
    whole, scale = quantize(x)
    assert whole.dtype == jnp.int8
    assert (jnp.abs(whole * scale[:, None] - x) <= 0.501 * scale[:, None]).all()
    assert jnp.abs(whole).max(-1).tolist() == [127 if row != 3 else 0 for row in range(50)]


@pytest.mark.parametrize("way", ["tpu", "cpu"])
def test_otherdecode_kernels_equal_the_plain_steps(way):
    config = dataclasses.replace(LONG, heads=4, head_dim=128)
    q, k, v = inputs(3, 600, config)
    _, held = attend(q, k, v, [600], config=config)
    given = q[:, :1], jnp.asarray([[599], [0], [70]]), held.k, held.v, held.table_BM, held.layer
    alike = attend_pages(*given, pages=KEYS // PAGE)
    with pltpu.force_tpu_interpret_mode() if way == "tpu" else contextlib.nullcontext():
        y = decode_kernels(q[:, :1], held.k)[way](*given)
    np.testing.assert_allclose(y, alike, atol=2e-2 if way == "tpu" else 1e-5)  # the kernel multiplies in bfloat16


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_the_kernel_for_gpus_equals_the_plain_steps(dtype, monkeypatch):
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(3, 200, dataclasses.replace(LONG, head_dim=16)))
    _, held = attend(q, k, v, [200], dtype, config=dataclasses.replace(LONG, head_dim=16))
    given = q[:, :1], jnp.asarray([[199], [0], [70]]), held.k, held.v, held.table_BM, held.layer
    alike = attend_pages(*given, pages=KEYS // PAGE)
    monkeypatch.setattr(paged, "gpu_paged_attention", functools.partial(paged.gpu_paged_attention, interpret=True))
    y = decode_kernels(q[:, :1], held.k)["cuda"](*given)
    np.testing.assert_allclose(y.astype(jnp.float32), alike.astype(jnp.float32), atol=3e-2)


def test_131072_tokens_in_chunks_need_no_square_of_memory(optimized):
    """The program is for as many tokens; 8192 of them run."""
    config = dataclasses.replace(LONG, context=131072, layers=1, heads=2, kv_heads=1, head_dim=8)
    length, chunk = 8192, 2048
    q, k, v = inputs(1, length, config)

    def some(start):
        now = slice(start, start + chunk)
        return q[:, now], k[:, now], v[:, now], jnp.arange(length)[None, now]

    cache = empty_cache(config, 1, config.context, jnp.float32)
    held = LayerCache(cache.k, cache.v, cache.table_BM, jnp.int32(0), None)
    compiled = jax.jit(update_and_attend, donate_argnums=4).lower(*some(0), held).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 2**20  # one head's scores of all pairs: 64 GiB
    looked_at = (0, 2047, 2048, 4_837, length - 1)
    y = {}
    for start in range(0, length, chunk):
        rows, held = compiled(*some(start), held)
        y |= {at: np.asarray(rows[0, at - start]) for at in looked_at if start <= at < start + chunk}
    for at in looked_at:
        scores = np.asarray(q[0, at]) @ np.asarray(k[0, : at + 1, 0]).T / np.sqrt(8)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weights @ np.asarray(v[0, : at + 1, 0]) / weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(y[at], expected, atol=1e-5)


def test_a_decode_step_copies_no_cache():
    """The compiled step has the cache as an argument, gives it back in its place, and needs little beside it."""
    params = jax.eval_shape(lambda: schema.initialize(LONG, jax.random.key(0)))
    cache = jax.eval_shape(lambda: empty_cache(LONG, 2, 4096, jnp.float32))

    def step(params, tokens, cache):
        return forward(LONG, params, tokens, cache=cache)[:2]

    tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    compiled = jax.jit(step, donate_argnums=2).lower(params, tokens, cache).compile()
    memory = compiled.memory_analysis()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 4


def test_too_many_tokens():
    with pytest.raises(UserError, match="at most the model's context of 4096 slots a row, got 4097"):
        empty_cache(LONG, 2, [3, 4097])
    cache = empty_cache(LONG, 1, 500)
    with pytest.raises(UserError, match="512 slots a row are too few for 513 tokens"):
        hidden_states(LONG, schema.initialize(LONG, jax.random.key(0)), jnp.zeros((1, 513), jnp.int32), cache=cache)


def test_heads_are_written_one_by_one_on_a_tpu_with_the_same_result(monkeypatch):
    generator = np.random.default_rng(0)
    pages = kv_cache.KVPages(jnp.zeros((3, 2, 4, kv_cache.PAGE, 8)), None)
    new_BTKH = jnp.asarray(generator.standard_normal((2, 1, 3, 8)), jnp.float32)
    page_BT, slot_BT = jnp.array([[2], [4]]), jnp.array([[5], [7]])  # the second is beyond the pool: dropped
    expected = kv_cache._write(pages, new_BTKH, 1, page_BT, slot_BT).pool
    monkeypatch.setattr(kv_cache, "target_platform", lambda: "tpu")
    got = kv_cache._write(pages, new_BTKH, 1, page_BT, slot_BT).pool
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got[:, 1, 2, 5], new_BTKH[0, 0])
    assert jnp.count_nonzero(got) == new_BTKH[0].size
