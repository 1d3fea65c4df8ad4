import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax.adapters.lora import Adapter
from nemoe_jax.kernels import moe_ffn_cpu
from nemoe_jax.model import expert_ffn
from nemoe_jax.model.expert_ffn import use_fused_ffn

TOKENS, WIDTH, NARROW, MANY, TOP_K = 60, 24, 12, 5, 3
CHOICES = {
    "any": lambda random: random.integers(0, MANY, (TOKENS, TOP_K)),
    "experts elsewhere": lambda random: random.integers(-3, MANY + 4, (TOKENS, TOP_K)),
    "one takes all": lambda random: np.full((TOKENS, TOP_K), 3),
    "none is here": lambda random: np.full((TOKENS, TOP_K), MANY),
}
NAMES = "gate", "up", "down"


def problem(choices, adapted):
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    shapes = {"gate": (WIDTH, NARROW), "up": (WIDTH, NARROW), "down": (NARROW, WIDTH)}
    experts = {name: normal(MANY, *shape) / np.sqrt(shape[0]) for name, shape in shapes.items()}
    adapters = {
        name: Adapter(normal(MANY, shape[0], rank) / shape[0], normal(MANY, rank, shape[1]), scale)
        for (name, shape), rank, scale in zip(shapes.items(), (2, 4, 3), (1.5, 0.7, 2.0), strict=True)
        if name in adapted
    }
    chosen = jnp.asarray(CHOICES[choices](random), jnp.int32)[None]
    return normal(1, TOKENS, WIDTH), normal(1, TOKENS, TOP_K), experts, adapters, chosen


def one_by_one(x, weights, experts, adapters, chosen):
    """Every expert's FFN over every token, and of these the chosen ones."""
    w = {
        name: experts[name] + (adapters[name].scale * adapters[name].a @ adapters[name].b if name in adapters else 0)
        for name in NAMES
    }
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, w["gate"])) * jnp.einsum("btd,edf->btef", x, w["up"])
    y = jnp.einsum("btef,efd->bted", hidden, w["down"])
    share = jnp.einsum("btc,btce->bte", weights, jax.nn.one_hot(chosen, MANY))
    return jnp.einsum("bted,bte->btd", y, share)


def results(function, x, weights, experts, adapters, chosen):
    def loss(*arguments):
        y = function(*arguments, chosen)
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.shape[-1]))), y

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(x, weights, experts, adapters)


def run(x, weights, experts, adapters, chosen):
    return expert_ffn.apply_experts(x, weights, chosen, experts, adapters, 0)


@pytest.mark.parametrize(
    ("choices", "adapted"),
    [
        *((choices, NAMES) for choices in CHOICES),
        ("experts elsewhere", ()),
        ("any", ("up",)),
        ("any", ("gate", "down")),
    ],
)
def test_sums_and_all_gradients_equal_those_of_every_expert(choices, adapted, monkeypatch):
    arguments = problem(choices, adapted)
    monkeypatch.delattr(expert_ffn, "project")  # which the tiles do without
    got, expected = results(run, *arguments), results(one_by_one, *arguments)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-4), got, expected)


def test_rows_of_experts_elsewhere_reach_nothing(monkeypatch):
    """What the sums' buffers held before the tiles wrote to them is not seen: here it is NaN."""
    arguments = problem("experts elsewhere", NAMES)
    expected = results(run, *arguments)
    inner, seen = moe_ffn_cpu.for_each_tile, []

    def poisoned(sizes_E, rows, prepare, work, carry):
        seen.append(type(carry))
        if isinstance(carry, dict):
            carry |= {name: jnp.full_like(carry[name], jnp.nan) for name in ("x", "weights")}
        else:
            carry = (jnp.full_like(carry[0], jnp.nan), *carry[1:])
        return inner(sizes_E, rows, prepare, work, carry)

    monkeypatch.setattr(moe_ffn_cpu, "for_each_tile", poisoned)
    jax.tree.map(np.testing.assert_array_equal, results(lambda *arguments: run(*arguments), *arguments), expected)
    assert seen == [tuple, dict]


def test_gradients_of_experts_are_computed_only_where_asked_for():
    x, weights, experts, adapters, chosen = problem("any", NAMES)

    def accumulators(*of):
        loss = lambda x, experts, adapters: jnp.sum(run(x, weights, experts, adapters, chosen))  # noqa: E731
        program = str(jax.make_jaxpr(jax.grad(loss, of))(x, experts, adapters))
        return f"f32[{MANY},{WIDTH},{2 * NARROW}]" in program

    assert accumulators(0, 1, 2) and not accumulators(0, 2)


def test_few_rows_dropout_and_other_dtypes_go_product_by_product():
    x, _, experts, adapters, _ = problem("any", NAMES)
    assert use_fused_ffn(x, experts, adapters, 40) and use_fused_ffn(x, experts, {}, 1)
    assert not use_fused_ffn(x, experts, adapters, 39)  # 5 · 24 · 12 / (24 + 12) = 40
    assert not use_fused_ffn(x.astype(jnp.bfloat16), experts, {}, 180)
    keyed = {"down": Adapter(adapters["down"].a, adapters["down"].b, 2.0, 0.1, jax.random.key(0))}
    assert not use_fused_ffn(x, experts, keyed, 180)
