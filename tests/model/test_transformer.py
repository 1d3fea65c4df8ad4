import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax.adapters import lora
from nemoe_jax.kernels import few_tokens_tpu
from nemoe_jax.model.kv_cache import empty_cache
from nemoe_jax.model.transformer import hidden_states, logits
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import ModelConfig
from tests.support.compiled import forward, normal, random_tokens
from tests.support.configs import CONFIGS


def setup(config, batch=3, length=13):
    params = schema.initialize(config, jax.random.key(0))
    return params, random_tokens(jax.random.key(1), (batch, length), config.vocab)


def test_logits_are_float32_whatever_the_weights(config):
    params, tokens = setup(config)
    params = jax.tree.map(lambda array: array.astype(jnp.bfloat16), params)
    output = forward(config, params, tokens)
    assert output.logits.dtype == jnp.float32
    assert output.logits.shape == (3, 13, config.vocab)


def test_logits_want_the_head_alone(config):
    params, tokens = setup(config)
    name = "embed" if config.tied else "head"
    adapters = lora.initialize(config, [lora.Target(name, 4, 8.0)], jax.random.key(2))
    adapters = jax.tree.map(lambda x: x + normal(jax.random.key(2), x.shape, 0.05), adapters)
    x = hidden_states(config, params, tokens, adapters=adapters).x_BTD
    got = logits(config, {name: params[name]}, x, adapters)
    np.testing.assert_allclose(got, forward(config, params, tokens, adapters=adapters).logits, atol=1e-6)
    assert float(jnp.abs(got - logits(config, params, x)).max()) > 1e-3


def test_prefill_and_decode_equal_the_full_pass(config):
    params, tokens = setup(config)
    expected = forward(config, params, tokens).logits
    output = forward(config, params, tokens[:, :5], cache=empty_cache(config, 3, 16, jnp.float32))
    parts = [output.logits]
    cache = output.cache
    for at in range(5, 13):
        next_logits, cache, *_ = forward(config, params, tokens[:, at : at + 1], cache=cache)
        parts.append(next_logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, atol=1e-5)
    assert cache.length_B.tolist() == [13] * 3


@pytest.mark.parametrize("tokens", [1, 13])
def test_a_few_tokens_on_a_tpu(config, tokens, monkeypatch):
    params, tokens_BT = setup(config, batch=1, length=tokens)
    expected = forward(config, params, tokens_BT).logits
    monkeypatch.setattr(few_tokens_tpu, "target_platform", lambda: "tpu")
    got = jax.jit(lambda params: logits(config, params, hidden_states(config, params, tokens_BT).x_BTD))(params)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_rows_of_different_lengths_share_a_cache(config):
    """Right-padded prompts of which only some tokens count; a row of none of which any counts stays as it is."""
    params, tokens = setup(config)
    lengths = np.array([4, 7, 2], np.int32)
    cache = empty_cache(config, 3, [8, 10, 5], jnp.float32)
    cache = forward(config, params, tokens[:, :7], cache=cache, num_new_tokens_B=jnp.asarray(lengths)).cache
    assert cache.length_B.tolist() == lengths.tolist()
    following = jnp.stack([tokens[row, length : length + 3] for row, length in enumerate(lengths)])
    counts = jnp.asarray([3, 3, 0])
    together = forward(config, params, following, cache=cache, num_new_tokens_B=counts)
    assert together.cache.length_B.tolist() == [7, 10, 2]
    again = forward(config, params, following, cache=together.cache, num_new_tokens_B=3 - counts)
    for row, (length, output) in enumerate(zip(lengths, (together, together, again), strict=True)):
        alone = forward(config, params, tokens[row : row + 1, : length + 3]).logits[0, length:]
        np.testing.assert_allclose(output.logits[row], alone, atol=1e-5)


def test_packed_documents_do_not_see_each_other(config):
    params, tokens = setup(config, batch=1)
    segments = jnp.asarray([[0] * 6 + [1] * 7])
    positions = jnp.asarray([[*range(6), *range(7)]])
    packed = forward(config, params, tokens, segments=segments, positions=positions).logits
    np.testing.assert_allclose(packed[:, :6], forward(config, params, tokens[:, :6]).logits, atol=1e-5)
    np.testing.assert_allclose(packed[:, 6:], forward(config, params, tokens[:, 6:]).logits, atol=1e-5)


def test_no_token_sees_a_later_one(config):
    params, tokens = setup(config)
    changed = tokens.at[:, 9].set((tokens[:, 9] + 1) % config.vocab)
    before, after = (forward(config, params, ids).logits for ids in (tokens, changed))
    np.testing.assert_allclose(after[:, :9], before[:, :9], atol=1e-6)
    assert float(jnp.abs(after[:, 9:] - before[:, 9:]).max()) > 1e-3


def test_what_attention_and_ffns_add_is_the_stream():
    config = CONFIGS["nekomind"]  # dense layers and MoE layers
    params, tokens = setup(config)
    output = jax.jit(functools.partial(hidden_states, config, keep=("ffn", "attention")))(params, tokens)
    added = output.outputs["attention"] + output.outputs["ffn"]
    stream = params["embed"][tokens] + added.sum(0)
    normed = stream / np.sqrt(np.mean(stream**2, -1, keepdims=True) + config.norm_eps) * params["norm"]
    np.testing.assert_allclose(normed, output.x_BTD, atol=1e-5)
    for block in params["blocks"].values():
        block["attn"]["o"] *= 0
    silent = jax.jit(functools.partial(hidden_states, config, keep=("attention",)))(params, tokens)
    assert silent.outputs["attention"].shape == added.shape and not silent.outputs["attention"].any()


def test_rematerialisation_changes_no_gradient(config):
    params, tokens = setup(config)

    def gradient(remat):
        def loss(params):
            return jnp.mean(jax.nn.log_softmax(forward(config, params, tokens, remat=remat).logits)[..., 3])

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(True), gradient(False))


# in the proportions of a 12B model
WIDE = ModelConfig(
    family="mistral", hidden=80, layers=2, heads=4, kv_heads=1, head_dim=16, ffn=224, vocab=64, context=64
)


@pytest.mark.usefixtures("optimized")
def test_the_gradient_of_adapters_computes_little_more_than_it_must():
    """With rematerialisation: forward, the gradients of the activations, and forward again without the last product of
    each layer; and no gradient of a frozen weight. XLA counts one layer of each loop."""
    params = schema.initialize(WIDE, jax.random.key(0))
    adapters = lora.initialize(WIDE, [lora.Target("blocks/*", 1, 2.0)], jax.random.key(1))
    tokens = jnp.zeros((4, 32), jnp.int32)

    def loss(adapters, params):
        return jnp.sum(hidden_states(WIDE, params, tokens, adapters=adapters, remat=True).x_BTD)

    counted = jax.jit(jax.grad(loss)).lower(adapters, params).compile().cost_analysis()["flops"]
    weights = sum(array[0].size for array in jax.tree.leaves(params["blocks"]) if array.ndim > 2)
    rank_1 = sum(array[0].size for array in jax.tree.leaves(adapters))
    scores = 2 * WIDE.heads * WIDE.head_dim * 32  # products of a token with all keys, and with all values
    model = 2 * tokens.size * (2 * weights + 3 * rank_1 + 3 * scores)
    assert 1.1 * model < counted < 1.45 * model
