import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from nemoe_jax.kernels.attention import dispatch
from nemoe_jax.kernels.attention.cpu import blockwise_attention_cpu
from nemoe_jax.kernels.attention.tpu import CornerMask, splash_attention
from nemoe_jax.kernels.attention.xla import flash_attention_xla
from tests.support.compiled import normal


def inputs(length, heads=4, kv_heads=2, head_dim=6, batch=2):
    shapes = [(batch, length, number, head_dim) for number in (heads, kv_heads, kv_heads)]
    q, k, v = (normal(jax.random.key(number), shape) for number, shape in enumerate(shapes))
    ends = jax.random.bernoulli(jax.random.key(3), 0.1, (batch, length))
    return q, k, v, 1 + jnp.cumsum(ends, axis=1, dtype=jnp.int32)


def plain(q, k, v, segments, window=None):
    """Every score, in the plainest way."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    seen = np.tril(np.ones((q.shape[1],) * 2, bool))
    if window is not None:
        seen &= ~np.tril(seen, -window)
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None])[:, None]
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)


def value_and_gradients(attention, q, k, v, segments):
    def loss(q, k, v):
        y = attention(q, k, v, segments).astype(jnp.float32)
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.shape[-1]))), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return y, *gradients


def check(attention, *arrays, window=None):
    for got, expected in zip(
        jax.tree.leaves(value_and_gradients(attention, *arrays)),
        jax.tree.leaves(value_and_gradients(functools.partial(plain, window=window), *arrays)),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, atol=3e-6 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one document"])
def test_chunks_equal_the_full_square(packed):
    """45 tokens in chunks of 16: the last chunk is not full, and documents end anywhere."""
    q, k, v, segments = inputs(45)
    check(lambda *arrays: flash_attention_xla(*arrays, 16), q, k, v, segments if packed else None)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one document"])
def test_steps_equal_the_full_square(packed):
    q, k, v, segments = inputs(45)
    check(lambda *arrays: blockwise_attention_cpu(*arrays, 16), q, k, v, segments if packed else None)


@pytest.mark.parametrize("window", [2, 7, 16, 17, 40])
@pytest.mark.parametrize("attention", [flash_attention_xla, blockwise_attention_cpu])
def test_a_window_hides_what_is_further_back(attention, window):
    q, k, v, segments = inputs(45)
    check(lambda *arrays: attention(*arrays, 16, window), q, k, v, segments, window=window)


def test_keys_before_the_window_are_not_read():
    q, k, v, segments = inputs(64)
    k, v = (x.at[:, :16].set(jnp.nan) for x in (k, v))
    for attention in (flash_attention_xla, blockwise_attention_cpu):
        y, vjp = jax.vjp(lambda q: attention(q, k, v, segments, 16, 17)[:, 32:], q)  # noqa: B023
        assert bool(jnp.isfinite(y).all()) and bool(jnp.isfinite(vjp(y)[0][:, 32:]).all())


def test_the_tpu_kernel_knows_the_window():
    q, k, v, segments = inputs(256, 4, 2, 128, 1)
    check(lambda *arrays: splash_attention(*arrays, 100, interpret=True), q, k, v, segments, window=100)


@pytest.mark.parametrize("window", [1, 30, 64, 200])
def test_plain_attention_knows_the_window(window, monkeypatch):
    monkeypatch.setattr(dispatch, "target_platform", lambda: "gpu")
    q, k, v, segments = inputs(45)
    for packed in (segments, None):
        got = dispatch.causal_attention(q, k, v, packed, window)
        np.testing.assert_allclose(got, plain(q, k, v, packed, window), atol=3e-6)


def test_a_step_keeps_no_scores_for_the_gradient():
    q, k, v, segments = inputs(256)
    kept = jax.eval_shape(lambda *arrays: jax.vjp(blockwise_attention_cpu, *arrays)[1], q, k, v, segments)
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) <= q.size


def test_chunks_of_keys_after_their_queries_are_not_visited():
    q, k, v, segments = inputs(48)
    k, v = (x.at[:, 32:].set(jnp.nan) for x in (k, v))  # zero times NaN would show
    y = flash_attention_xla(q, k, v, segments, 16)
    assert bool(jnp.isfinite(y[:, :32]).all())
    dq = jax.grad(lambda q: jnp.sum(flash_attention_xla(q, k, v, segments, 16)[:, :32]))(q)
    assert bool(jnp.isfinite(dq[:, :32]).all())


@pytest.mark.usefixtures("optimized")
def test_memory_is_far_below_a_byte_for_each_pair_of_tokens():
    arrays = jax.eval_shape(lambda: inputs(32768, 2, 1, 8, 1))
    gradient = jax.grad(lambda *arrays: jnp.sum(flash_attention_xla(*arrays)), (0, 1, 2))
    memory = jax.jit(gradient).lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 32768**2 / 16


def test_the_tpu_kernel_equals_the_full_square():
    q, k, v, segments = inputs(256, 4, 2, 128, 1)
    check(lambda *arrays: splash_attention(*arrays, interpret=True), q, k, v, segments)


def test_the_corners_of_the_mask_tell_the_tpu_kernel_all():
    def infos(mask, process):
        masks = splash_attention_mask.MultiHeadMask([mask((1024, 1024))] * 4)
        return process(masks, (128, 128), head_shards=1, q_seq_shards=1)[0]

    for process in (mask_info.process_mask, mask_info.process_mask_dkv):
        jax.tree.map(
            np.testing.assert_array_equal, infos(CornerMask, process), infos(splash_attention_mask.CausalMask, process)
        )
