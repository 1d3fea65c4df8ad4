import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax import lora, schema
from nemoe_jax.errors import UserError
from nemoe_jax.lora import Target
from nemoe_jax.transformer import forward
from tests.conftest import MIXTRAL


def every_weight(config, **options):
    narrow = [Target("*/shared_gate", 1, 2.0, **options)] if config.shared_ffn else []
    return [*narrow, Target("*", 3, 6.0, **options)]


def trained(config, targets, seed=1):
    """Adapters as if trained: B is not zero."""
    adapters = lora.initialise(config, targets, jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), adapters)


def test_fresh_adapters_change_nothing(config):
    params = schema.initialise(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, config.vocab)
    adapters = lora.initialise(config, every_weight(config), jax.random.key(2))
    np.testing.assert_array_equal(
        forward(config, params, tokens, adapters=adapters).logits, forward(config, params, tokens).logits
    )


def test_merged_weights_give_the_adapted_logits_for_every_weight(config):
    params = schema.initialise(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, config.vocab)
    base = forward(config, params, tokens).logits
    run = jax.jit(lambda params, adapters: forward(config, params, tokens, adapters=adapters).logits)
    every = schema.leaves(trained(config, every_weight(config)))
    for path in every:
        # the other adapters are there, and zero: one compilation serves all
        chosen = {other: jax.tree.map(lambda x, on=other == path: x * on, adapter) for other, adapter in every.items()}
        adapters = schema.unflatten(chosen)
        adapted = run(params, adapters)
        merged = run(lora.merge(config, params, schema.unflatten({path: every[path]})), None)
        assert float(jnp.abs(adapted - base).max()) > 1e-4, path
        np.testing.assert_allclose(merged, adapted, atol=2e-5, err_msg=path)


def test_every_adapter_gets_a_gradient(config):
    params = schema.initialise(config, jax.random.key(0))
    # enough tokens that every expert is chosen
    tokens = jax.random.randint(jax.random.key(1), (8, 32), 0, config.vocab)
    adapters = trained(config, every_weight(config))

    def loss(adapters):
        return jnp.mean(jax.nn.log_softmax(forward(config, params, tokens, adapters=adapters).logits)[..., 3])

    gradients = jax.jit(jax.grad(loss))(adapters)
    for path, adapter in schema.leaves(gradients).items():
        for matrix in (adapter.a, adapter.b):
            stacked = len(schema.leaves(schema.declare(config))[path].stacked)
            norms = jnp.sqrt(jnp.sum(matrix**2, axis=tuple(range(stacked, matrix.ndim))))
            assert float(norms.min()) > 0, path  # of each layer and each expert


def test_each_expert_has_an_adapter_of_its_own():
    adapters = lora.initialise(MIXTRAL, [Target("blocks/moe/ffn/gate", 5, 10.0)], jax.random.key(0))
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
        (Target("*", 0, 8.0), "wanted a positive rank"),
        (Target("*", 3, 8.0, dropout=1.0), "dropout: wanted 0 to below 1, got 1.0"),
        (
            Target("blocks/*/ffn/[gr]*", 13, 8.0),
            r"blocks/\*/ffn/\[gr\]\*: rank 13 is above 12, the smaller dimension of blocks/moe/ffn/gate \(24, 12\)",
        ),
    ],
)
def test_bad_targets(target, message):
    with pytest.raises(UserError, match=message):
        lora.match(MIXTRAL, [target])
