import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nemoe_jax.adapters import lora
from nemoe_jax.adapters.lora import Adapter, Target
from nemoe_jax.errors import UserError
from nemoe_jax.model.layers import project
from nemoe_jax.spec import schema, sharding
from nemoe_jax.spec.mesh import make_mesh
from tests.support.compiled import forward, merge, normal, random_adapters, random_tokens
from tests.support.configs import DENSE, MIXTRAL


def every_weight(config, **options):
    narrow = [Target("*/shared_gate", 1, 2.0, **options)] if config.shared_ffn else []
    return [*narrow, Target("*", 3, 6.0, **options)]


def test_fresh_adapters_change_nothing(config):
    params = schema.initialize(config, jax.random.key(0))
    tokens = random_tokens(jax.random.key(1), (2, 7), config.vocab)
    adapters = lora.initialize(config, every_weight(config), jax.random.key(2))
    got, expected = forward(config, params, tokens, adapters=adapters).logits, forward(config, params, tokens).logits
    # on CPU the experts' A stand beside their W in one product, which rounds otherwise than W alone
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_merged_weights_give_the_adapted_logits_for_every_weight(config):
    params = schema.initialize(config, jax.random.key(0))
    tokens = random_tokens(jax.random.key(1), (2, 7), config.vocab)
    base = forward(config, params, tokens).logits
    run = jax.jit(lambda params, adapters: forward(config, params, tokens, adapters=adapters).logits)
    every = schema.leaves(random_adapters(config, every_weight(config), 0.1))
    for path in every:
        # the other adapters are there, and zero: one compilation serves all
        chosen = {
            other: jax.tree.map(lambda x, on=other == path: np.asarray(x) * np.float32(on), adapter)
            for other, adapter in every.items()
        }
        adapters = schema.unflatten(chosen)
        adapted = run(params, adapters)
        merged = run(merge(config, params, adapters), None)
        assert float(jnp.abs(adapted - base).max()) > 1e-4, path
        np.testing.assert_allclose(merged, adapted, atol=2e-5, err_msg=path)


def test_every_adapter_gets_a_gradient(config):
    params = schema.initialize(config, jax.random.key(0))
    # enough tokens that every expert is chosen
    tokens = random_tokens(jax.random.key(1), (8, 32), config.vocab)
    adapters = random_adapters(config, every_weight(config), 0.1)

    def loss(adapters, params):
        return jnp.mean(jax.nn.log_softmax(forward(config, params, tokens, adapters=adapters).logits)[..., 3])

    gradients = jax.jit(jax.grad(loss))(adapters, params)
    for path, adapter in schema.leaves(gradients).items():
        for matrix in (adapter.a, adapter.b):
            stacked = len(schema.leaves(schema.declare(config))[path].stacked)
            sizes = np.abs(np.asarray(matrix)).max(axis=tuple(range(stacked, matrix.ndim)))
            assert sizes.min() > 0, path  # of each layer and each expert


def test_each_expert_has_an_adapter_of_its_own():
    adapters = lora.initialize(MIXTRAL, [Target("blocks/moe/ffn/gate", 5, 10.0)], jax.random.key(0))
    adapter = adapters["blocks"]["moe"]["ffn"]["gate"]
    assert adapter.a.shape == (3, 16, 24, 5)
    assert adapter.b.shape == (3, 16, 5, 12)
    assert adapter.scale == 2.0


def test_the_first_matching_target_wins():
    matched = lora.match(MIXTRAL, [Target("blocks/*/attn/q", 2, 4.0), Target("blocks/*/attn/*", 7, 14.0)])
    assert {path.rpartition("/")[2]: target.rank for path, (_, target) in matched.items()} == {
        "q": 2,
        "k": 7,
        "v": 7,
        "o": 7,
    }


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("blocks/*/attention/*", 4, 8.0), "matches no weight; the weights are: embed, blocks/moe/attn/q"),
        (Target("norm", 4, 8.0), "matches no weight"),  # a norm is no linear map
        (Target("*", 0, 8.0), "expected a positive rank"),
        (Target("*", 3, 8.0, dropout=1.0), "dropout: expected 0 to below 1, got 1.0"),
        (
            Target("blocks/*/ffn/[gr]*", 13, 8.0),
            r"blocks/\*/ffn/\[gr\]\*: rank 13 is above 12, the smaller dimension of blocks/moe/ffn/gate \(24, 12\)",
        ),
    ],
)
def test_bad_targets(target, message):
    with pytest.raises(UserError, match=message):
        lora.match(MIXTRAL, [target])


def test_rank_stabilized_scale():
    assert Target("*", 16, 8.0).scale == 0.5
    assert Target("*", 16, 8.0, rslora=True).scale == 2.0


MESH = {"fsdp": 2, "expert": 2, "tensor": 2}


def test_adapters_are_made_where_they_live_and_are_the_same_there():
    targets = [Target("*", 4, 8.0)]
    mesh = make_mesh(MESH)
    places = lora.shardings(MIXTRAL, targets, mesh)
    placed = lora.initialize(MIXTRAL, targets, jax.random.key(0), places)
    alone = lora.initialize(MIXTRAL, [Target("*/[gq]*", 4, 8.0)], jax.random.key(0))  # others do not matter either
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), placed) == lora.abstract(MIXTRAL, targets)
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding == place, placed, places))
    assert places["blocks"]["moe"]["ffn"]["gate"].a.shard_shape((3, 16, 24, 4))[1] <= 8  # of 16 experts
    params = schema.initialize(MIXTRAL, jax.random.key(0), shardings=sharding.shardings(MIXTRAL, mesh))
    merged = lora.merge(MIXTRAL, params, placed)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, merged, params))
    for path, adapter in schema.leaves(alone).items():
        np.testing.assert_array_equal(adapter.a, schema.leaves(placed)[path].a, err_msg=path)


def test_dropout_drops_and_scales_the_adapters_input_alone():
    adapters = random_adapters(MIXTRAL, [Target("*/q", 3, 6.0, dropout=0.25), Target("*", 3, 6.0)], 0.1)
    with_keys = schema.leaves(lora.with_dropout(adapters, jax.random.key(7)))
    assert [path for path, adapter in with_keys.items() if adapter.key is not None] == ["blocks/moe/attn/q"]
    stacked = with_keys["blocks/moe/attn/q"]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in stacked.key}) == 3  # one for each layer
    adapter = jax.tree.map(lambda x: x[1], stacked)
    x = normal(jax.random.key(1), (5, 7, 24))
    weight = normal(jax.random.key(2), (24, 6, 10))
    kept = np.asarray(jax.random.bernoulli(adapter.key, 0.75, x.shape))
    assert 0.7 < kept.mean() < 0.8
    expected = np.einsum("btd,dnh->btnh", x, weight)
    expected += 2.0 * np.einsum("btd,dr,rnh->btnh", x * kept / 0.75, adapter.a, adapter.b)
    np.testing.assert_allclose(project(x, weight, 1, adapter), expected, atol=1e-4)


def test_dropout_is_the_same_when_blocks_are_recomputed():
    params = schema.initialize(DENSE, jax.random.key(0))
    adapters = random_adapters(
        DENSE, [Target("embed", 3, 6.0, dropout=0.5), Target("blocks/*/[qg]*", 3, 6.0, dropout=0.5)], 0.1
    )
    assert adapters["embed"].dropout == 0.0  # a look-up
    tokens = random_tokens(jax.random.key(1), (2, 7), DENSE.vocab)

    @functools.partial(jax.jit, static_argnums=3)
    def loss_and_gradient(adapters, params, key, remat):
        def loss(adapters):
            keyed = lora.with_dropout(adapters, key)
            return forward(DENSE, params, tokens, adapters=keyed, remat=remat).logits.std()

        return jax.value_and_grad(loss)(adapters)

    first, again = (loss_and_gradient(adapters, params, jax.random.key(3), remat) for remat in (False, True))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), first, again)
    assert loss_and_gradient(adapters, params, jax.random.key(4), False)[0] != first[0]


def test_devices_drop_independently_where_they_hold_other_tokens_or_experts():
    mesh = make_mesh({"data": 2, "expert": 4})
    adapter = Adapter(jnp.ones((24, 3)), jnp.ones((3, 12)), 1.0, 0.5, jax.random.key(0))

    def masks(axes):
        def on_device(adapter):
            own = lora.keys_by_device({"gate": adapter}, axes)["gate"]
            return lora.dropped(jnp.ones((1, 40)), own)

        places = PartitionSpec(("data", "expert"))
        run = jax.shard_map(on_device, mesh=mesh, in_specs=PartitionSpec(), out_specs=places, check_vma=False)
        return jax.jit(run)(adapter)

    assert len(np.unique(masks(["data", "expert"]), axis=0)) == 8
    assert len(np.unique(masks(["expert"]), axis=0)) == 4
    assert len(np.unique(masks([]), axis=0)) == 1


def test_dropout_over_a_mesh():
    params = schema.initialize(MIXTRAL, jax.random.key(0))
    tokens = random_tokens(jax.random.key(1), (8, 11), MIXTRAL.vocab)
    mesh = make_mesh(MESH)

    @jax.jit
    def logits(adapters, params, key):
        keyed = adapters if key is None else lora.with_dropout(adapters, key)
        return forward(MIXTRAL, params, tokens, adapters=keyed).logits

    adapters = random_adapters(MIXTRAL, [Target("blocks/moe/ffn/[gud]*", 4, 8.0, dropout=0.2)], 0.1)
    alone = logits(adapters, params, None)
    placed = jax.device_put(
        adapters, lora.shardings(MIXTRAL, [Target("blocks/moe/ffn/[gud]*", 4, 8.0, dropout=0.2)], mesh)
    )
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits(placed, params, None), alone, atol=2e-5)
        first, again, other = (np.asarray(logits(placed, params, jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert 1e-3 < np.abs(first - alone).mean() < np.abs(alone).mean()
    assert np.abs(first - other).max() > 1e-3
