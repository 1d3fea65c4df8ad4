"""What experts add to a few tokens, the way TPUs compute it, against one token at a time in NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nemoe_jax.adapters.lora import Adapter
from nemoe_jax.adapters.multi_lora import StackedAdapter
from nemoe_jax.kernels import few_tokens_tpu, fp8
from nemoe_jax.model import expert_ffn
from nemoe_jax.model.expert_ffn import apply_experts
from nemoe_jax.spec.fp8_weight import Fp8Weight

HELD, FIRST, TOP_K, WIDTH, NARROW, RANK = 4, 2, 3, 16, 8, 2
ALL = 8  # experts; this device holds 2, 3, 4 and 5
INDEX = np.array([[0, 1, -1], [1, 0, 0]])


@pytest.fixture(autouse=True, params=["every expert", "chosen ones"])
def on_a_tpu(request, monkeypatch):
    monkeypatch.setattr(few_tokens_tpu, "target_platform", lambda: "tpu")
    if request.param == "chosen ones":
        monkeypatch.setattr(expert_ffn, "_run_every_expert", expert_ffn._run_choices)


def arrays(*shapes):
    generator = np.random.default_rng(0)
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def tokens():
    (x, weights) = arrays((2, 3, WIDTH), (2, 3, TOP_K))
    chosen = np.random.default_rng(1).permuted(np.tile(np.arange(ALL), (2, 3, 1)), axis=-1)[..., :TOP_K]
    assert {1, 2, 5, 6} < set(chosen.flat)  # own and others', on both sides
    return x, weights, chosen


def experts():
    gate, up, down = arrays((HELD, WIDTH, NARROW), (HELD, WIDTH, NARROW), (HELD, NARROW, WIDTH))
    return {"gate": gate, "up": up, "down": down}


def oracle(x, weights, chosen, experts_of, rounded=lambda row: row):
    """`experts_of(place)` are the weights that the token there meets, `rounded` makes of rows what products take."""
    y = np.zeros_like(x)
    for at in np.ndindex(x.shape[:2]):
        own = experts_of(at)
        for weight, expert in zip(weights[at], chosen[at] - FIRST, strict=True):
            if 0 <= expert < HELD:
                gate, up, down = (own[name][expert] for name in ("gate", "up", "down"))
                gated, wide = rounded(x[at]) @ gate, rounded(x[at]) @ up
                y[at] += rounded(weight * gated / (1 + np.exp(-gated)) * wide) @ down
    return y


def in_fp8(row):
    scale = np.abs(row).max() / 448
    return (row / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def run(experts, adapters=None, index=None, dtype=jnp.float32, chosen=None):
    x, weights, all_chosen = tokens()
    chosen = all_chosen if chosen is None else chosen
    given = jnp.asarray(x, dtype), jnp.asarray(weights, dtype), jnp.asarray(chosen)
    experts = jax.tree.map(jnp.asarray, experts)
    return jax.jit(lambda: apply_experts(*given, experts, adapters or {}, FIRST, index))()


def test_experts_of_this_device_alone():
    own = experts()
    np.testing.assert_allclose(run(own), oracle(*tokens(), lambda at: own), atol=1e-4)


def test_an_expert_that_nobody_chose_may_overflow():
    own = experts()
    x, weights, chosen = tokens()
    chosen = np.where(np.isin(chosen, (FIRST, FIRST + 1)), 0, chosen)  # 0 is another device's, before this one's first
    expected = oracle(x, weights, chosen, lambda at: own)
    for overflowing in 0, 1:
        own["gate"][overflowing] = own["up"][overflowing] = 1e30
    np.testing.assert_allclose(run(own, chosen=chosen), expected, atol=1e-4)


@pytest.mark.parametrize("joined", [False, True], ids=["one adapter", "each token its own"])
def test_adapters_add_up(joined):
    """As weights into which they are merged."""
    own = experts()
    count = 2 if joined else 1
    factors = {
        name: arrays((HELD, w.shape[1], count * RANK), (HELD, count * RANK, w.shape[2])) for name, w in own.items()
    }
    adapters = {}
    for name, (a, b) in factors.items():
        both = jnp.asarray(a), jnp.asarray(b)
        adapters[name] = StackedAdapter(*both, 0.5, ranks=(RANK, RANK)) if joined else Adapter(*both, 0.5)

    def merged(at):
        number = INDEX[at] if joined else 0
        if number < 0:
            return own
        part = slice(number * RANK, (number + 1) * RANK)
        return {name: w + 0.5 * factors[name][0][..., part] @ factors[name][1][:, part] for name, w in own.items()}

    y = run(own, adapters, jnp.asarray(INDEX) if joined else None)
    np.testing.assert_allclose(y, oracle(*tokens(), merged), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("blocks", "products"), [(1, False), (4, False), (1, True)], ids=["one scale", "blocks", "products in FP8"]
)
def test_weights_in_fp8(blocks, products, monkeypatch):
    for module in few_tokens_tpu, fp8:
        monkeypatch.setattr(module, "has_fp8_products", lambda dtype: products)
    own, rounded = {}, {}
    for name, w in experts().items():
        values = w.astype(ml_dtypes.float8_e4m3fn)
        scale = np.random.default_rng(2).uniform(0.5, 2, (HELD, blocks, w.shape[2])).astype(np.float32)
        rounded[name] = values.astype(np.float32) * np.repeat(scale, w.shape[1] // blocks, 1)
        own[name] = Fp8Weight(jnp.asarray(values), jnp.asarray(scale))
    expected = oracle(*tokens(), lambda at: rounded, in_fp8 if products else lambda row: row)
    error = np.std(run(own, dtype=jnp.bfloat16).astype(np.float32) - expected) / np.std(expected)
    assert error < 0.02  # activations between the products are in bfloat16


def test_gradients_go_past_the_rounding_of_fp8(monkeypatch):
    for module in few_tokens_tpu, fp8:
        monkeypatch.setattr(module, "has_fp8_products", lambda dtype: True)
    own = {}
    for name, w in experts().items():
        scale = jnp.ones((HELD, 1, w.shape[2]), jnp.float32)
        own[name] = Fp8Weight(jnp.asarray(w.astype(ml_dtypes.float8_e4m3fn)), scale)
    wide = {name: w.dequantized(jnp.float32, stacked=1) for name, w in own.items()}
    x, weights, chosen = tokens()

    def gradient(experts, dtype):
        def loss(x):
            given = x.astype(dtype), jnp.asarray(weights, dtype), jnp.asarray(chosen)
            return 1e-3 * jnp.sum(apply_experts(*given, experts, {}, FIRST).astype(jnp.float32))

        return np.asarray(jax.jit(jax.grad(loss))(x))

    expected = gradient(wide, jnp.float32)
    assert np.std(gradient(own, jnp.bfloat16) - expected) < 0.15 * np.std(expected)


def test_gradients_are_those_of_the_other_way(monkeypatch):
    own = experts()

    def gradients():
        x, weights, chosen = tokens()

        def loss(x, weights, own):
            return jnp.sum(jnp.sin(apply_experts(x, weights, jnp.asarray(chosen), own, {}, FIRST)))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(x, weights, own)

    got = gradients()
    monkeypatch.setattr(few_tokens_tpu, "target_platform", lambda: "cpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), got, gradients())
