import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from nemoe_jax.kernels.attention.gpu import gpu_attention, packed_attention
from nemoe_jax.kernels.attention.paged import gpu_paged_attention
from tests.kernels.test_attention import plain, value_and_gradients


def inputs(length, dtype, heads=4, kv_heads=2, head_dim=32, batch=2):
    shapes = [(batch, length, number, head_dim) for number in (heads, kv_heads, kv_heads)]
    q, k, v = (jax.random.normal(jax.random.key(number), shape).astype(dtype) for number, shape in enumerate(shapes))
    ends = jax.random.bernoulli(jax.random.key(3), 0.02, (batch, length))
    return q, k, v, 1 + jnp.cumsum(ends, axis=1, dtype=jnp.int32)


def check(attention, arrays, tolerance):
    exact = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays if x is not None]
    exact += [None] * (4 - len(exact))
    for got, expected in zip(value_and_gradients(attention, *arrays), value_and_gradients(plain, *exact), strict=True):
        np.testing.assert_allclose(
            np.asarray(got, np.float32), expected, atol=tolerance * float(jnp.abs(expected).max()), rtol=0
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 2e-2)], ids=["f32", "bf16"])
def test_packed_documents_equal_the_full_square(dtype, tolerance):
    """150 tokens: the kernel's last blocks are not full, and documents end anywhere."""
    check(functools.partial(packed_attention, interpret=True), inputs(150, dtype), tolerance)


def test_float32_and_odd_heads_are_computed_without_a_kernel():
    q, k, v, segments = inputs(45, jnp.float32)
    check(gpu_attention, (q, k, v, segments), 1e-5)
    check(gpu_attention, (*inputs(45, jnp.bfloat16, head_dim=20)[:3], None), 2e-2)


def lowered(function, *shapes):
    """The program for a card that is not there; newer versions of JAX ask what it would be."""
    card = jax.sharding.AbstractDevice("NVIDIA H200", None, "gpu")
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=card)):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


SHAPES = [((2, 1000, heads, 128), jnp.bfloat16) for heads in (32, 8, 8)]


@pytest.fixture
def cudnn(monkeypatch):
    """JAX looks for the library and the card while it traces."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: capability <= "8.0")


def test_one_document_a_row_is_cudnn_forward_and_backward(cudnn):
    def attention(q, k, v):
        return gpu_attention(q, k, v, None)

    def loss(q, k, v):
        return attention(q, k, v).astype(jnp.float32).sum()

    assert lowered(attention, *SHAPES).count("__cudnn$fmhaSoftmax(") == 1
    program = lowered(jax.grad(loss, (0, 1, 2)), *SHAPES)
    assert program.count("__cudnn$fmhaSoftmax(") == program.count("__cudnn$fmhaSoftmaxBackward(") == 1
    assert "1000x1000x" not in program and "8x128" in program  # no scores, and keys as they are


def test_packed_documents_are_triton_without_scores():
    program = lowered(gpu_attention, *SHAPES, ((2, 1000), jnp.int32))
    assert "mha_forward" in program and "triton" in program
    assert "1024x1024" not in program


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "int8"])
def test_one_query_a_row_sees_its_pages(quantized):
    """Rows of a token, of whole pages and of the whole table; pages lie anywhere."""
    kv_heads, pages, slots, width, lengths = 2, 12, 16, 32, np.array([1, 48, 127])
    random = np.random.default_rng(0)
    q = random.normal(size=(3, 8, width)).astype(np.float32)
    k, v = random.normal(size=(2, kv_heads, pages, slots, width)).astype(np.float32)
    table = random.integers(0, pages, (3, 8)).astype(np.int32)
    scales = ()
    held = k, v
    if quantized:
        scales = np.abs(k).max(-1) / 127, np.abs(v).max(-1) / 127
        held = tuple(np.round(x / scale[..., None]).astype(np.int8) for x, scale in zip((k, v), scales, strict=True))
        k, v = (x * scale[..., None] for x, scale in zip(held, scales, strict=True))
    got = gpu_paged_attention(q, *held, jnp.asarray(lengths, jnp.int32), table, *scales, interpret=True)
    for row, length in enumerate(lengths):
        for head in range(8):
            keys, values = (x[head // 4, table[row]].reshape(-1, width)[:length] for x in (k, v))
            weights = np.exp(keys @ q[row, head] / np.sqrt(width))
            np.testing.assert_allclose(got[row, head], weights @ values / weights.sum(), atol=1e-5)
