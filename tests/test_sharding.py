import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax import lora, schema, sharding
from nemoe_jax.config import preset
from nemoe_jax.errors import UserError
from nemoe_jax.transformer import forward
from tests.conftest import MIXTRAL, NEKOMIND

MESHES = [
    {"fsdp": 8},
    {"expert": 8},
    {"fsdp": 2, "expert": 4},
    {"data": 2, "expert": 2, "tensor": 2},
    {"fsdp": 4, "tensor": 2},
]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pipeline=2", "unknown axis 'pipeline'"),
        ("fsdp=2,fsdp=4", "named twice"),
        ("fsdp=0", "wanted a positive size for axis fsdp, got '0'"),
        ("fsdp", "wanted a positive size for axis fsdp, got ''"),
    ],
)
def test_bad_meshes(text, message):
    with pytest.raises(UserError, match=message):
        sharding.parse_mesh(text)


def test_a_mesh_must_use_all_devices():
    with pytest.raises(UserError, match="wants 6 devices; there are 8"):
        sharding.make_mesh({"fsdp": 6})


def spec_of(path):
    return schema.leaves(schema.declare(preset("nemoe-12b-16e")))[path]


def test_experts_lie_on_the_expert_axis_and_the_rest_on_fsdp_and_tensor():
    place = sharding.partition_spec(spec_of("blocks/moe/ffn/gate"), {"fsdp": 2, "expert": 4, "tensor": 2})
    assert place == jax.sharding.PartitionSpec(None, ("expert",), ("fsdp",), ("tensor",))


def test_all_else_is_cut_over_fsdp_and_expert_together():
    place = sharding.partition_spec(spec_of("blocks/moe/attn/q"), {"fsdp": 2, "expert": 4, "tensor": 2})
    assert place == jax.sharding.PartitionSpec(None, ("fsdp", "expert"), ("tensor",), None)


def test_a_size_that_does_not_divide_is_named():
    with pytest.raises(UserError, match=r"blocks/moe/ffn/gate: axis experts of size 16 does not divide .* of size 3"):
        sharding.partition_spec(spec_of("blocks/moe/ffn/gate"), {"expert": 3})


def test_two_axes_on_one_mesh_axis_are_named():
    rules = {"embed": ("fsdp",), "heads": ("fsdp",)}
    with pytest.raises(UserError, match="blocks/moe/attn/q: axes embed and heads are both mapped to mesh axis fsdp"):
        sharding.partition_spec(spec_of("blocks/moe/attn/q"), {"fsdp": 2}, rules)


def test_a_rule_for_arrays_stacked_over_experts_wins():
    rules = {"embed": ("fsdp",), "experts": ("expert", "fsdp"), "experts.embed": ()}
    place = sharding.partition_spec(spec_of("blocks/moe/ffn/gate"), {"fsdp": 2, "expert": 4}, rules)
    assert place == jax.sharding.PartitionSpec(None, ("expert", "fsdp"), None, None)


def objective(config, params, adapters, tokens):
    output = forward(config, params, tokens, adapters=adapters)
    loss = jnp.mean(jax.nn.log_softmax(output.logits)[..., 5])
    return loss + output.routing.balance_loss + output.routing.z_loss, output.logits


@pytest.mark.parametrize("config", [MIXTRAL, NEKOMIND], ids=["mixtral", "nekomind"])
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: ",".join(f"{k}={v}" for k, v in sizes.items()))
def test_logits_and_gradients_equal_those_of_one_device(config, sizes):
    params = schema.initialise(config, jax.random.key(0))
    narrow = [lora.Target("*/shared_gate", 1, 2.0)] if config.shared_ffn else []
    adapters = lora.initialise(config, [*narrow, lora.Target("*", 4, 8.0)], jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), adapters)
    tokens = jax.random.randint(jax.random.key(3), (8, 11), 0, config.vocab)

    def run(params, adapters, tokens):
        return jax.value_and_grad(lambda p, a: objective(config, p, a, tokens), (0, 1), has_aux=True)(params, adapters)

    (loss, logits), gradients = jax.jit(run)(params, adapters, tokens)
    mesh = sharding.make_mesh(sizes)
    placed = jax.device_put(params, sharding.shardings(config, mesh))
    with jax.set_mesh(mesh):
        (mesh_loss, mesh_logits), mesh_gradients = jax.jit(run)(placed, adapters, tokens)
        few = jax.jit(lambda p, t: forward(config, p, t, adapters=adapters).logits)(placed, tokens[:3])
    np.testing.assert_allclose(mesh_logits, logits, atol=2e-5)
    np.testing.assert_allclose(few, logits[:3], atol=2e-5)  # a batch that no mesh axis divides
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-5)
    for path, wanted in schema.leaves(gradients[0]).items():
        got = schema.leaves(mesh_gradients[0])[path]
        np.testing.assert_allclose(got, wanted, atol=2e-5 * float(jnp.abs(wanted).max()), err_msg=path)
    jax.tree.map(
        lambda got, wanted: np.testing.assert_allclose(got, wanted, atol=2e-5 * float(jnp.abs(wanted).max())),
        mesh_gradients[1],
        gradients[1],
    )
