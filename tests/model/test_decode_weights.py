import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax.model import decode_weights
from nemoe_jax.model.kv_cache import empty_cache
from nemoe_jax.model.transformer import forward
from nemoe_jax.spec import schema
from tests.support.configs import DENSE, NEKOMIND


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_that_reads_in_place_equals_one_that_does_not(config, dtype, monkeypatch):
    params = schema.initialize(config, jax.random.key(0), dtype)
    tokens = jnp.asarray([[5, 9, 31, 7], [3, 1, 4, 1]])
    empty = empty_cache(config, 2, 16, dtype)
    cache = jax.jit(lambda params: forward(config, params, tokens, cache=empty).cache)(params)
    following = jnp.asarray([[11], [12]])
    products = []
    multiply = decode_weights.LayerSlice.multiply
    monkeypatch.setattr(
        decode_weights.LayerSlice, "multiply", lambda *given: products.append(given) or multiply(*given)
    )

    def step(params):
        return jax.jit(lambda params: forward(config, params, following, cache=cache))(params)

    got = step(decode_weights.prepare_decode_params(params, 2))
    assert products
    monkeypatch.setattr("nemoe_jax.model.transformer.use_inplace_weights", lambda rows, weight: False)
    expected = step(params)
    np.testing.assert_allclose(got.logits, expected.logits, atol=1e-5 if dtype == jnp.float32 else 0.03)
    if expected.routing is not None:
        np.testing.assert_allclose(got.routing.load_E, expected.routing.load_E, atol=1e-6)


def test_matrices_become_bits_and_norms_stay():
    params = schema.initialize(NEKOMIND, jax.random.key(0), jnp.bfloat16)
    of_path = schema.leaves(decode_weights.prepare_decode_params(params, 8))
    dtypes = {path: array.dtype for path, array in of_path.items()}
    assert {path for path, dtype in dtypes.items() if dtype != jnp.uint16} == {
        path for path in dtypes if "norm" in path or path == "embed"
    }


def test_more_tokens_of_a_dense_model_read_views_of_the_stacks():
    """Dots of each layer's own matrix, none of them copied: as XLA slices the stacks, to rounding."""
    params = schema.initialize(DENSE, jax.random.key(0))
    prepared = decode_weights.prepare_decode_params(params, 9)
    stack, unstacked = (tree["blocks"]["dense"]["ffn"]["up"] for tree in (params, prepared))
    assert unstacked.layers[1].unsafe_buffer_pointer() == stack.unsafe_buffer_pointer() + stack[0].nbytes
    empty = empty_cache(DENSE, 1, 16, jnp.float32)
    step = jax.jit(lambda params: forward(DENSE, params, jnp.arange(3, 12)[None], cache=empty).logits)
    np.testing.assert_allclose(step(prepared), step(params), atol=1e-5)
    assert not decode_weights.can_unstack(schema.initialize(NEKOMIND, jax.random.key(0)))


@pytest.mark.parametrize(
    ("rows", "dtype", "in_place"),
    [(8, jnp.float32, True), (9, jnp.float32, False), (1, jnp.uint16, True), (1, jnp.bfloat16, False)],
)
def test_few_rows_on_one_cpu_are_read_in_place(rows, dtype, in_place):
    weight = jax.ShapeDtypeStruct((3, 4, 5), dtype)
    assert decode_weights.use_inplace_weights(rows, weight) == in_place
    with jax.set_mesh(jax.make_mesh((8,), ("tensor",))):
        assert not decode_weights.use_inplace_weights(rows, weight)
