import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nemoe_jax.kernels.grouped_matmul.cpu import tile_rows
from nemoe_jax.model import expert_ffn
from nemoe_jax.model.moe import MoE, top_k_weights, with_gradient_of_groups
from nemoe_jax.model.transformer import graph_of
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import ModelConfig
from tests.support.compiled import normal, random_tokens
from tests.support.configs import MIXTRAL, NEKOMIND


def layer_of(config, seed=0):
    """(the MoE module, its parameters) of the first MoE layer."""
    params = schema.initialize(config, jax.random.key(seed))
    weights = jax.tree.map(lambda array: array[0], params["blocks"]["moe"]["ffn"])
    graph = nnx.split(nnx.eval_shape(lambda: MoE(config, schema.declare(config)["blocks"]["moe"]["ffn"])))[0]
    return lambda weights, x, segments=None: nnx.merge(graph, weights)(x, segments_BT=segments), weights


def silu(x):
    return x / (1 + np.exp(-x))


def oracle(config, weights, x_BTD):
    """One token at a time, in NumPy."""
    weights = jax.tree.map(np.asarray, weights)
    y_BTD = np.zeros_like(x_BTD)
    for at in np.ndindex(x_BTD.shape[:2]):
        x = x_BTD[at]
        logits = x @ weights["router"]
        chosen = np.argsort(-logits)[: config.top_k]
        probabilities = np.exp(logits - logits.max())
        norm = probabilities[chosen].sum() if config.normalize_top_k else probabilities.sum()
        for expert in chosen:
            gate, up, down = (weights[name][expert] for name in ("gate", "up", "down"))
            y_BTD[at] += probabilities[expert] / norm * ((silu(x @ gate) * (x @ up)) @ down)
        if config.shared_ffn:
            shared = weights["shared"]
            share = 1 / (1 + np.exp(-(x @ weights["shared_gate"])))
            y_BTD[at] += share * ((silu(x @ shared["gate"]) * (x @ shared["up"])) @ shared["down"])
    return y_BTD


@pytest.mark.parametrize(
    "config",
    [MIXTRAL, MIXTRAL.replace(top_k=1), MIXTRAL.replace(top_k=16), NEKOMIND, NEKOMIND.replace(normalize_top_k=False)],
    ids=["top-4", "top-1", "all", "shared expert", "not normalized"],
)
def test_equals_one_token_at_a_time(config):
    layer, weights = layer_of(config)
    x = normal(jax.random.key(1), (3, 7, config.hidden))
    y, routing = jax.jit(layer)(weights, x)
    np.testing.assert_allclose(y, oracle(config, weights, np.asarray(x)), atol=3e-6)
    assert float(routing.load_E.sum()) == pytest.approx(1)


@pytest.mark.parametrize("at_once", [4096, 5], ids=["all tokens at once", "in six parts"])
def test_gradients_equal_those_of_a_mixture_computed_in_full(at_once, monkeypatch):
    monkeypatch.setattr(expert_ffn, "AT_ONCE", at_once)
    layer, weights = layer_of(MIXTRAL)
    x = normal(jax.random.key(1), (2, 9, MIXTRAL.hidden))

    def full(weights, x):
        logits = x @ weights["router"]
        top, chosen = jax.lax.top_k(logits, MIXTRAL.top_k)
        share = (jax.nn.one_hot(chosen, MIXTRAL.experts) * jax.nn.softmax(top)[..., None]).sum(-2)
        hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, weights["gate"]))
        hidden = hidden * jnp.einsum("btd,edf->btef", x, weights["up"])
        return jnp.einsum("btef,efd,bte->btd", hidden, weights["down"], share)

    def loss(function):
        return jax.jit(jax.grad(lambda weights, x: jnp.sum(jnp.sin(function(weights, x))), (0, 1)))(weights, x)

    got, expected = loss(lambda weights, x: layer(weights, x)[0]), loss(full)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


def test_other_devices_rows_never_reach_a_gradient(monkeypatch):
    """A grouped matmul leaves rows beyond its groups undefined, forward and backward: here they are NaN."""
    monkeypatch.setattr(expert_ffn, "use_fused_ffn", lambda *_: False)
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = {"gate": (2, 24, 12), "up": (2, 24, 12), "down": (2, 12, 24)}
    experts = {name: normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=False)}
    x = normal(keys[3], (2, 4, 24))
    weights = jax.nn.softmax(normal(keys[4], (2, 4, 2)))
    chosen = random_tokens(keys[5], (2, 4, 2), 4)  # of which experts 1 and 2 are here

    def gradients():
        loss = lambda *arrays: jnp.sum(jnp.sin(expert_ffn.apply_experts(*arrays[:2], chosen, arrays[2], {}, 1)))  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(x, weights, experts)

    @jax.custom_vjp
    def poisoned(array, counts, forward, backward):
        return jnp.where(counts, array, forward)

    poisoned.defvjp(
        lambda array, counts, forward, backward: (poisoned(array, counts, forward, backward), (counts, backward)),
        lambda kept, dy: (jnp.where(kept[0], dy, kept[1]), None, None, None),
    )
    project, expected = expert_ffn.project, gradients()

    def without_the_rest(x_RD, weight, inputs, adapter, sizes_E):
        counts = (jnp.arange(len(x_RD)) < sizes_E.sum())[:, None]
        assert not counts.all()
        y_RF = project(poisoned(x_RD, counts, 1.0, jnp.nan), weight, inputs, adapter, sizes_E)
        return poisoned(y_RF, counts, jnp.nan, 0.0)

    monkeypatch.setattr(expert_ffn, "project", without_the_rest)
    jax.tree.map(np.testing.assert_array_equal, gradients(), expected)


def test_statistics_of_an_even_and_of_a_one_sided_router():
    layer, weights = layer_of(MIXTRAL)
    x = normal(jax.random.key(1), (4, 8, MIXTRAL.hidden))
    even = layer(weights | {"router": jnp.zeros_like(weights["router"])}, x)[1]
    assert float(even.balance_loss) == pytest.approx(1)
    assert float(even.z_loss) == pytest.approx(np.log(MIXTRAL.experts) ** 2)
    one_sided = jnp.zeros_like(weights["router"]).at[:, 3].set(50 * jnp.sign(x[0, 0]))
    load = layer(weights | {"router": one_sided}, x[:1, :1])[1].load_E
    assert float(load[3]) == pytest.approx(1 / MIXTRAL.top_k)
    assert float(even.entropy) == pytest.approx(np.log(MIXTRAL.experts))


def test_padding_does_not_count_in_the_statistics():
    layer, weights = layer_of(MIXTRAL)
    layer = jax.jit(layer)
    x = normal(jax.random.key(1), (2, 8, MIXTRAL.hidden))
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0, 0, 0], [1] * 5 + [0] * 3])
    routing = layer(weights, x, segments=segments)[1]
    expected = layer(weights, x[:, :5])[1]
    jax.tree.map(lambda got, right: np.testing.assert_allclose(got, right, rtol=1e-5), routing, expected)
    everything = layer(weights, x)[1]
    assert abs(float(everything.z_loss) - float(expected.z_loss)) > 1e-3
    nothing = layer(weights, x, segments=jnp.zeros((2, 8), jnp.int32))[1]
    assert not any(jnp.any(leaf) for leaf in nothing)


FLOPS = ModelConfig(
    family="mixtral",
    hidden=64,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=32,
    vocab=64,
    experts=16,
    top_k=4,
    expert_ffn=32,
)


def compiled_flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.usefixtures("optimized")
def test_the_compiled_layer_computes_few_more_products_than_the_chosen_experts_need():
    """XLA counts a loop's body once, so the tiles that the loops run through are multiplied in: at worst rows / tile
    + experts of them, for each of gate, up and down."""
    layer, weights = layer_of(FLOPS)
    tokens, rows = 1024, 1024 * FLOPS.top_k
    x = jnp.zeros((4, tokens // 4, FLOPS.hidden))
    tile = tile_rows(rows, FLOPS.experts)
    one_tile = 3 * 2 * tile * FLOPS.hidden * FLOPS.expert_ffn
    ideal = 2 * tokens * FLOPS.hidden * (3 * FLOPS.top_k * FLOPS.expert_ffn + FLOPS.experts)
    counted = compiled_flops(lambda weights, x: layer(weights, x)[0], weights, x)
    in_all = counted + (rows // tile + FLOPS.experts - 1) * one_tile
    assert counted >= one_tile + 2 * tokens * FLOPS.hidden * FLOPS.experts  # the count does see the loops' bodies
    assert in_all <= 1.3 * ideal


@pytest.mark.usefixtures("optimized")
def test_no_gradient_of_frozen_experts_is_computed():
    layer, weights = layer_of(FLOPS)
    x = jnp.zeros((4, 256, FLOPS.hidden))

    def loss(weights, x):
        return jnp.sum(layer(weights, x)[0] ** 2)

    frozen = compiled_flops(jax.grad(loss, argnums=1), weights, x)
    trained = compiled_flops(jax.grad(loss, argnums=(0, 1)), weights, x)
    tile = tile_rows(1024 * FLOPS.top_k, FLOPS.experts)
    one_tile = 3 * 2 * tile * FLOPS.hidden * FLOPS.expert_ffn  # a body each of gate's, up's and down's weight gradient
    assert trained - frozen >= one_tile


def test_a_graph_serves_any_parameters_of_its_config():
    assert graph_of(MIXTRAL) is graph_of(MIXTRAL.replace())


def test_a_row_that_a_group_has_in_common_learns_as_a_choice_among_groups():
    """The gradient of the output's part that the loss sees, ⟨v, y⟩ p_g/p_g(now), by the group's one logit."""
    random = np.random.default_rng(0)
    group_E = np.array([0, 1, 2, 0, 1, 2])
    of_groups = random.normal(size=(3, 5, 3)).astype("f4")
    values = random.normal(size=(3, 5, 2)).astype("f4")

    def weights_of(of_groups):
        logits = of_groups[..., group_E]
        weights, chosen = top_k_weights(logits, 2)
        return with_gradient_of_groups(weights, logits, chosen)

    np.testing.assert_array_equal(weights_of(of_groups), np.full((3, 5, 2), 0.5, "f4"))
    got = jax.grad(lambda of_groups: jnp.sum(values * weights_of(of_groups)))(jnp.asarray(of_groups))
    probability = np.exp(of_groups) / np.exp(of_groups).sum(-1, keepdims=True)
    chosen = of_groups == of_groups.max(-1, keepdims=True)
    np.testing.assert_allclose(got, values.mean(-1, keepdims=True) * (chosen - probability), rtol=1e-4, atol=1e-6)
