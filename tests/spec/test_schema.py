import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nemoe_jax.model.transformer import Transformer
from nemoe_jax.spec import schema, sharding
from nemoe_jax.spec.config import preset
from nemoe_jax.spec.mesh import make_mesh
from tests.support.configs import NEKOMIND


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mistral-nemo-12b", 12_247_782_400, 12_247_782_400),
        ("nemoe-12b-16e", 12_247_782_400 + 40 * 16 * 5120, None),
        ("minitron-8b", 8_414_105_600, 8_414_105_600),
        ("nekomind1.5-1b", 1_354_563_072, 297_598_464),
    ],
)
def test_published_parameter_counts(name, total, active):
    config = preset(name)
    assert schema.count(config) == (total, active or schema.count(config)[1])


@pytest.mark.parametrize("top_k", [2, 4])
def test_active_parameters_are_what_one_token_meets(top_k):
    config = preset("nemoe-12b-16e").replace(top_k=top_k)
    idle = 40 * (16 - top_k) * 3 * 5120 * 896
    assert schema.count(config)[1] == schema.count(config)[0] - idle


def test_the_models_state_is_the_schemas_tree(config):
    state = nnx.split(nnx.eval_shape(lambda: Transformer(config)))[1]
    of_model = schema.leaves(nnx.to_pure_dict(state))
    of_schema = schema.leaves(schema.declare(config))
    assert {path: leaf.shape for path, leaf in of_model.items()} == {
        path: spec.shape for path, spec in of_schema.items()
    }


def test_leaves_and_unflatten_are_inverse(config):
    tree = schema.declare(config)
    assert schema.unflatten(schema.leaves(tree)) == tree


def test_every_tensor_has_a_key_of_its_own_and_the_sizes_add_up(config):
    keys = [key for spec in schema.leaves(schema.declare(config)).values() for _, key in spec.tensors()]
    assert len(keys) == len(set(keys))
    elements = sum(spec.torch_size for spec in schema.leaves(schema.declare(config)).values() for _ in spec.tensors())
    assert elements == schema.count(config)[0]


def test_checkpoint_layout_is_the_transpose_of_a_linear_map():
    spec = schema.declare(preset("mistral-nemo-12b"))["blocks"]["dense"]["attn"]["o"]
    assert spec.shape == (40, 32, 128, 5120)
    assert spec.torch_shape == (5120, 32 * 128)
    small = np.arange(2 * 3 * 5).reshape(2, 3, 5)  # heads, head_dim, embed
    spec = schema.dataclasses.replace(spec, shape=(40, 2, 3, 5))
    assert np.array_equal(spec.to_torch(small), small.reshape(6, 5).T)


def test_first_values_do_not_depend_on_the_mesh(config):
    key = jax.random.key(7)
    alone = schema.initialize(config, key)
    mesh = make_mesh({"fsdp": 2, "expert": 4})
    spread = schema.initialize(config, key, shardings=sharding.shardings(config, mesh))
    jax.tree.map(np.testing.assert_array_equal, alone, jax.device_get(spread))


def test_first_values_have_their_declared_deviation():
    config = NEKOMIND.replace(hidden=200, vocab=512)  # some arrays are made by themselves, others by a length
    params = schema.leaves(schema.initialize(config, jax.random.key(0), jnp.bfloat16))
    for path, spec in schema.leaves(schema.declare(config)).items():
        values = np.asarray(params[path], np.float32)
        assert values.std() == pytest.approx(spec.std or 0, rel=0.1), path
