"""Every family, and every way to stretch RoPE, against transformers in float32."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nemoe_jax.checkpoints.pretrained import load_pretrained
from nemoe_jax.model.kv_cache import empty_cache
from nemoe_jax.model.rope import rope_cos_sin
from nemoe_jax.model.transformer import forward
from nemoe_jax.spec import schema
from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.spec.hf_config import from_hf, to_hf
from tests.support.families import IDS, SIZES, lively, make, torch_logits


@pytest.mark.parametrize("family", SIZES)
def test_logits_equal_those_of_transformers_in_one_pass_and_with_a_cache(family, tmp_path):
    model = lively(make(family))
    model.save_pretrained(tmp_path)
    expected = torch_logits(model)
    config, params = load_pretrained(tmp_path)
    assert config.family == family and schema.count(config)[0] == sum(tensor.numel() for tensor in model.parameters())

    @jax.jit
    def run(params, ids):
        cache = empty_cache(config, len(ids), 32, jnp.float32)
        read = forward(config, params, ids[:, :-1], cache=cache)
        made = forward(config, params, ids[:, -1:], cache=read.cache)
        return forward(config, params, ids).logits, jnp.concatenate([read.logits, made.logits], axis=1)

    for logits in run(params, IDS):
        np.testing.assert_allclose(logits, expected, atol=1e-4 * max(expected.std(), 1))


def test_every_family_of_transformers_is_among_them():
    assert {name for name, family in FAMILIES.items() if family.in_transformers} == SIZES.keys()


YARN = {"factor": 4.0, "original_max_position_embeddings": 24}
ROPE = {
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24},
    "yarn": YARN,
    "yarn with mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn with a temperature": {**YARN, "attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2},
    "yarn without rounding": {**YARN, "truncate": False},
    "yarn of a context": {"factor": 4.0},
}


@pytest.mark.parametrize("length", [40, 41, 97])
@pytest.mark.parametrize("kind", ROPE)
def test_rotary_angles_are_those_of_transformers(kind, length):
    rope = {"rope_type": kind.partition(" ")[0], "rope_theta": 5e4, **ROPE[kind]}
    sizes = {**SIZES["llama"], "head_dim": 32, "max_position_embeddings": 40}
    theirs = LlamaConfig(**sizes, rope_parameters=dict(rope))
    positions = np.arange(length)[None]
    expected = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.from_numpy(positions))
    old = {**sizes, "model_type": "llama", "rope_theta": rope["rope_theta"], "rope_scaling": rope}
    for content in (
        json.loads(theirs.to_json_string()),
        {**sizes, "model_type": "llama", "rope_parameters": rope},
        old,
    ):
        config = from_hf(content)
        assert from_hf(to_hf(config)) == config
        for got, of_halves in zip(rope_cos_sin(config, jnp.asarray(positions)), expected, strict=True):
            np.testing.assert_allclose(got, of_halves.numpy()[..., :16], atol=2e-5)


def test_each_sequence_goes_by_its_own_length():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = from_hf({**SIZES["llama"], "model_type": "llama", "rope_parameters": rope, "max_position_embeddings": 16})
    positions = jnp.stack([jnp.arange(24), jnp.arange(24)])
    counted = jnp.stack([jnp.arange(24) < 12, jnp.ones(24, bool)])
    short, long = rope_cos_sin(config, positions, counted)[0]
    np.testing.assert_array_equal(short[:12], rope_cos_sin(config, positions[:1, :12])[0][0])
    np.testing.assert_array_equal(long, rope_cos_sin(config, positions[:1])[0][0])
