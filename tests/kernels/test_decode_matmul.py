"""A few rows times stacked weights: against NumPy, and without a copy of a layer's weights in the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nemoe_jax.kernels.decode_matmul_cpu import as_uint16, decode_expert_matmul, decode_matmul

LAYERS, EXPERTS = 3, 5
# odd sizes, one column, one input, more columns than a kernel takes, a prime number of them
SHAPES = [(24, 10), (7, 3), (1, 6), (9, 1), (16, 4100), (6, 2053)]


def arrays(rows: int, *shape: int, dtype: str):
    """Rows, weights as they are multiplied, and what is handed over of them."""
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, shape[-2])).astype(np.float32)
    w = jnp.asarray(random.standard_normal(shape), dtype)
    return x, np.asarray(w, np.float32), as_uint16(w)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_equal_numpy(shape, rows, dtype):
    x, w, given = arrays(rows, LAYERS, *shape, dtype=dtype)
    for layer in range(LAYERS):
        y = jax.jit(decode_matmul)(x, given, layer)
        assert y.shape == (rows, shape[1])
        np.testing.assert_allclose(y, x @ w[layer], rtol=1e-5, atol=1e-5 * shape[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_each_row_meets_its_expert(shape, dtype):
    x, w, given = arrays(6, LAYERS, EXPERTS, *shape, dtype=dtype)
    chosen = np.array([0, 4, 4, 2, 0, 3], np.int32)
    for layer in (0, 2):
        y = jax.jit(decode_expert_matmul)(x, given, layer, chosen)
        expected = np.einsum("rd,rdf->rf", x, w[layer, chosen])
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * shape[0])


def test_results_have_the_dtype_of_the_rows_and_sums_are_float32():
    x, w, given = arrays(2, 1, 512, 8, dtype="bfloat16")
    x = jnp.asarray(x, jnp.bfloat16)
    y = decode_matmul(x, given, 0)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ w[0].astype(np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_no_copy_of_weights_is_compiled(rows, dtype):
    """Temporary memory is that of rows, far from that of a layer's, or an expert's, weights; so of those alone."""
    layers, experts, depth, width = 4, 3, 512, 1024
    weights = jax.ShapeDtypeStruct((layers, experts, depth, width), "uint16" if dtype == "bfloat16" else dtype)
    shared = jax.ShapeDtypeStruct((layers, depth, width), weights.dtype)
    x = jax.ShapeDtypeStruct((rows, depth), jnp.float32)
    chosen = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def decode(x_RD, weights, shared, chosen):
        def step(layer, x_RD):
            y_RF = decode_matmul(x_RD, shared, layer) + decode_expert_matmul(x_RD, weights, layer, chosen)
            return x_RD + y_RF[:, :depth]

        return lax.fori_loop(0, layers, step, x_RD)

    compiled = jax.jit(decode).lower(x, weights, shared, chosen).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < min(depth * width * weights.dtype.itemsize, 2**17 * rows)
    layer_of_weights = f"[1,{depth},{width}]", f"[{depth},{width}]", f"[{experts},{depth},{width}]"
    assert not any(shape in compiled.as_text() for shape in layer_of_weights)


def test_bits_are_no_copy():
    w = jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8)
    assert as_uint16(w).dtype == jnp.uint16
    assert as_uint16(w).unsafe_buffer_pointer() == w.unsafe_buffer_pointer()
    np.testing.assert_array_equal(np.asarray(as_uint16(w)).view(jnp.bfloat16), np.asarray(w))
    given = w.astype(jnp.float32)
    assert as_uint16(given) is given
