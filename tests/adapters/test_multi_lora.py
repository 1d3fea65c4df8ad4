import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax.adapters import lora, peft_load
from nemoe_jax.adapters.lora import Adapter, Target
from nemoe_jax.adapters.multi_lora import select_adapters, stack_adapters
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.errors import UserError
from nemoe_jax.model import decode_weights, expert_parallel, transformer
from nemoe_jax.model.kv_cache import empty_cache
from nemoe_jax.spec import schema, sharding
from nemoe_jax.spec.mesh import make_mesh
from tests.support import peft_models
from tests.support.compiled import forward, merge, random_adapters, random_tokens
from tests.support.configs import DENSE, MIXTRAL, NEKOMIND

INDEX = jnp.asarray([1, -1, 0, 2, 1, 0, -1, 2], jnp.int32)


def targets_of(config):
    narrow = [Target("*/shared_gate", 1, 2.0)] if config.shared_ffn else []
    return {
        "every": [*narrow, Target("*", 3, 6.0)],
        "attention": [Target("blocks/*/attn/[qo]", 5, 2.5), Target("embed", 2, 4.0)],
        "ffn": [*narrow, Target("blocks/*/ffn/*", 4, 8.0, rslora=True)],
    }


@functools.cache
def several(config):
    """Adapters of other targets and ranks, as if trained."""
    own = sorted(targets_of(config).items())  # the order that JAX gives a dict
    return {name: random_adapters(config, targets, seed=number) for number, (name, targets) in enumerate(own)}


@functools.cache
def case(config):
    """(parameters, tokens, each row's logits by the adapter that INDEX gives it, alone with it; logits without any)."""
    params = schema.initialize(config, jax.random.key(0))
    tokens = random_tokens(jax.random.key(1), (len(INDEX), 12), config.vocab)
    run = jax.jit(lambda params, adapters: forward(config, params, tokens, adapters=adapters).logits)
    alone = {-1: run(params, None)}
    for number, adapters in enumerate(several(config).values()):
        alone[number] = run(params, adapters)
        merged = run(merge(config, params, adapters), None)
        np.testing.assert_allclose(alone[number], merged, atol=5e-5)
        assert float(jnp.abs(merged - alone[-1]).max()) > 1e-2
    return params, tokens, jnp.stack([alone[int(own)][row] for row, own in enumerate(INDEX)]), alone[-1]


def test_each_row_of_a_batch_has_its_own_adapter(config):
    params, tokens, expected, base = case(config)
    joined = stack_adapters(config, several(config))

    @jax.jit
    def run(params, joined, index):
        return forward(config, params, tokens, adapters=select_adapters(joined, index)).logits

    np.testing.assert_allclose(run(params, joined, INDEX), expected, atol=2e-5)
    np.testing.assert_allclose(run(params, joined, jnp.full_like(INDEX, -1)), base, atol=2e-6)
    assert run._cache_size() == 1


def test_with_a_cache_and_rows_of_different_lengths(config):
    params, tokens, expected, _ = case(config)
    joined = stack_adapters(config, several(config))

    @jax.jit
    def read(params, joined, tokens, counts, cache, index):
        output = forward(
            config, params, tokens, adapters=select_adapters(joined, index), cache=cache, num_new_tokens_B=counts
        )
        return output.logits, output.cache

    rng = np.random.default_rng(0)
    cache = empty_cache(config, len(INDEX), 16, jnp.float32)
    done, got = np.zeros(len(INDEX), int), np.zeros(expected.shape)
    for width in (5, 5, 1, 1, 1, 1):
        counts = np.minimum(rng.integers(0, width + 1, len(INDEX)), 12 - done) if width > 1 else (done < 12).astype(int)
        part = np.zeros((len(INDEX), width), np.int32)
        for row, count in enumerate(counts):
            part[row, :count] = tokens[row, done[row] : done[row] + count]
        logits, cache = read(params, joined, jnp.asarray(part), jnp.asarray(counts), cache, INDEX)
        for row, count in enumerate(counts):
            got[row, done[row] : done[row] + count] = logits[row, :count]
        done += counts
    assert read._cache_size() == 2
    for row, count in enumerate(done):
        assert count > 5
        np.testing.assert_allclose(got[row, :count], expected[row, :count], atol=3e-5)


@pytest.mark.parametrize("way", ["gather", "all-to-all"])
def test_over_a_mesh(config, way, monkeypatch):
    if way == "all-to-all" and not config.experts:
        pytest.skip("a dense model has nothing to exchange")
    monkeypatch.setattr(expert_parallel, "exchange_of", lambda *_: way)
    params, tokens, expected, _ = case(config)
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    placed = jax.device_put(params, sharding.shardings(config, mesh))
    places = {name: lora.shardings(config, own, mesh) for name, own in targets_of(config).items()}
    joined = stack_adapters(config, jax.device_put(several(config), places))
    for path, place in schema.leaves(places["every"]).items():
        adapter = schema.leaves(joined)[path]
        assert adapter.a.sharding.is_equivalent_to(place.a, adapter.a.ndim)
        assert adapter.b.sharding.is_equivalent_to(place.b, adapter.b.ndim)
    with jax.set_mesh(mesh):

        @jax.jit
        def run(params, joined, index):
            adapters = select_adapters(joined, index)
            return transformer.forward(config, params, tokens, adapters=adapters).logits

        np.testing.assert_allclose(run(placed, joined, INDEX), expected, atol=3e-5)


@pytest.mark.parametrize("kind", [peft_models.mistral, peft_models.mixtral], ids=["mistral", "mixtral"])
def test_directories_of_peft(kind, tmp_path):
    directory = peft_models.base(kind, tmp_path)
    experts = {"target_parameters": peft_models.EXPERTS} if kind is peft_models.mixtral else {}
    options = {
        "attention": {"target_modules": ["q_proj", "v_proj"], "r": 5},
        "all": {"target_modules": ["embed_tokens", "o_proj", "lm_head"], "lora_alpha": 4} | experts,
    }
    expected = [
        peft_models.logits_of(peft_models.adapt(directory, tmp_path / name, **own)) for name, own in options.items()
    ]
    expected.append(peft_models.logits_of(peft_models.opened(directory)))
    config, params = pretrained.load_pretrained(directory)
    joined = stack_adapters(config, {name: peft_load.load_adapters(tmp_path / name, config)[1] for name in options})
    index = jnp.asarray([0, 1, -1])
    got = forward(config, params, jnp.asarray(peft_models.IDS), adapters=select_adapters(joined, index)).logits
    for row, own in enumerate(index):
        np.testing.assert_allclose(got[row], expected[own][row], atol=2e-4)
        assert np.abs(expected[own] - expected[own - 1])[row].max() > 0.1


@pytest.mark.parametrize("config", [MIXTRAL, NEKOMIND], ids=["mixtral", "nekomind"])  # NEKOMIND begins dense
def test_a_step_that_reads_bits_in_place_equals_one_that_does_not(config, monkeypatch):
    params = schema.initialize(config, jax.random.key(0), jnp.bfloat16)
    tokens, empty = jnp.asarray([[5, 9], [3, 1]]), empty_cache(config, 2, 16)
    cache = forward(config, params, tokens, cache=empty).cache
    trees = (
        several(config)["every"],
        select_adapters(stack_adapters(config, several(config), jnp.bfloat16), jnp.asarray([2, 0])),
    )
    products = []
    multiply = decode_weights.LayerSlice.multiply
    monkeypatch.setattr(
        decode_weights.LayerSlice, "multiply", lambda *given: products.append(given) or multiply(*given)
    )

    def step(params):
        following = jnp.asarray([[7], [8]])
        run = jax.jit(
            lambda params, one: transformer.forward(config, params, following, adapters=one, cache=cache).logits
        )
        return [run(params, one) for one in trees]

    got = step(decode_weights.prepare_decode_params(params, 2))
    assert products
    monkeypatch.setattr("nemoe_jax.model.transformer.use_inplace_weights", lambda rows, weight: False)
    np.testing.assert_allclose(got, step(params), atol=0.06)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"norm": jnp.ones(24)}, "adapter poems: norm: the model has no such linear map"),
        ({"head": jnp.ones((24, 72))}, "adapter poems: head: expected a low-rank update, got ArrayImpl"),
        ({"head": Adapter(np.ones((24, 2)), np.ones((2, 71)), 1.0)}, r"head: expected .* \(2, 72\), got .* \(2, 71\)"),
        ({"heads": 1, "norm": 2}, "adapter poems: heads: .*adapter poems: norm"),
    ],
)
def test_what_cannot_be_joined_is_named(wrong, message):
    with pytest.raises(UserError, match=message):
        stack_adapters(DENSE, {"sql": several(DENSE)["attention"], "poems": wrong})


def test_a_whole_weight_of_peft_is_refused(tmp_path):
    directory = peft_models.base(peft_models.mistral, tmp_path)
    peft_models.adapt(directory, tmp_path / "poems", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"poems.*lm_head.weight replaces lm_head.weight: not a low-rank update; merge"):
        peft_load.load_adapters(tmp_path / "poems", pretrained.load_pretrained(directory)[0])
