"""Every family that llama.cpp has, out and in again: llama.cpp's logits are ours, and what comes back is the source."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.cli import main
from convert.gguf.export import GgufOptions, to_gguf
from convert.gguf.from_gguf import from_gguf
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig, RopeScaling
from tests.support.compiled import forward
from tests.support.llama_server import COMMON, LlamaCpp, cut, save

SMALL = {**COMMON, "vocab": 1100}
MOE = {**SMALL, "ffn": 96, "experts": 5, "top_k": 3, "expert_ffn": 32}
QWEN2 = {**SMALL, "hidden": 192}  # llama.cpp wants heads that fill it
LLAMA = ModelConfig(family="llama", ffn=96, **SMALL)
MODELS = {
    "qwen2": ModelConfig(family="qwen2", ffn=96, attention_bias="qkv", **QWEN2),
    "qwen3": ModelConfig(family="qwen3", ffn=96, qk_norm=True, tied=True, **SMALL),
    "qwen2_moe": ModelConfig(
        family="qwen2_moe", shared_ffn=64, attention_bias="qkv", normalize_top_k=False, **MOE | QWEN2
    ),
    "qwen3_moe": ModelConfig(family="qwen3_moe", qk_norm=True, **MOE),
    "llama-bias": LLAMA.replace(attention_bias="qkvo"),
    "llama-linear": LLAMA.replace(rope_scaling=RopeScaling("linear", 4.0)),
    "llama-yarn": LLAMA.replace(rope_scaling=RopeScaling("yarn", 4.0, original_context=64, attention_factor=1.2)),
    "llama-llama3": LLAMA.replace(rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, original_context=8192)),
}
TOKENS = [1, 300, 1000, 30, 500, 77, 30, 30, 12, 600]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rounded(config: ModelConfig) -> ModelConfig:
    """With the numbers of the scaling as float32 can hold them."""
    scaling = config.rope_scaling
    if scaling is None:
        return config
    values = {name: round(value, 5) for name, value in vars(scaling).items() if isinstance(value, float)}
    return config.replace(rope_scaling=dataclasses.replace(scaling, **values))


@pytest.mark.parametrize("case", MODELS)
def test_there_and_back(case, tmp_path):
    config = MODELS[case]
    params = jax.tree.map(jnp.asarray, save(tmp_path / "model", config))
    cut(tmp_path / "model", SMALL["vocab"])
    to_gguf(tmp_path / "model", tmp_path / "model.gguf", GgufOptions())
    ours_V = jax.nn.log_softmax(forward(config, params, jnp.asarray([TOKENS])).logits[0, -1])
    theirs_V = LlamaCpp(tmp_path / "model.gguf").log_probabilities(TOKENS, config.vocab)
    np.testing.assert_allclose(theirs_V, ours_V, atol=3e-4)
    from_gguf(tmp_path / "model.gguf", tmp_path / "back")
    original, back = Checkpoint(tmp_path / "model"), Checkpoint(tmp_path / "back")
    assert rounded(back.config) == rounded(config)
    for key in original.files:
        np.testing.assert_array_equal(original.view(key), back.view(key), err_msg=key)


@pytest.mark.parametrize(
    ("family", "normalizes", "message"),
    [
        ("qwen3_moe", False, "qwen3moe always divides the weights .* norm_topk_prob = false"),
        ("qwen2_moe", True, "qwen2moe always does not divide the weights .* norm_topk_prob = true"),
    ],
)
def test_other_weights_of_the_chosen_experts_are_refused(family, normalizes, message, tmp_path):
    config = MODELS[family].replace(normalize_top_k=normalizes)
    save(tmp_path / "model", config)
    cut(tmp_path / "model", SMALL["vocab"])
    with pytest.raises(UserError, match=message):
        to_gguf(tmp_path / "model", tmp_path / "model.gguf", GgufOptions())


def test_heads_that_do_not_fill_a_qwen2_are_refused(tmp_path):
    save(tmp_path / "model", MODELS["qwen2"].replace(hidden=64))
    cut(tmp_path / "model", SMALL["vocab"])
    with pytest.raises(UserError, match="heads that fill the width of 64, got 6 heads of 32"):
        to_gguf(tmp_path / "model", tmp_path / "model.gguf", GgufOptions())


def test_where_all_experts_are_chosen_it_makes_no_difference(tmp_path):
    config = MODELS["qwen3_moe"].replace(normalize_top_k=False, top_k=5)
    params = jax.tree.map(jnp.asarray, save(tmp_path / "model", config))
    cut(tmp_path / "model", SMALL["vocab"])
    to_gguf(tmp_path / "model", tmp_path / "model.gguf", GgufOptions())
    ours_V = jax.nn.log_softmax(forward(config, params, jnp.asarray([TOKENS])).logits[0, -1])
    theirs_V = LlamaCpp(tmp_path / "model.gguf").log_probabilities(TOKENS, config.vocab)
    np.testing.assert_allclose(theirs_V, ours_V, atol=3e-4)


def test_a_window_that_llama_cpp_does_not_have_bounds_the_context(tmp_path):
    config = ModelConfig(family="mistral", ffn=96, sliding_window=64, **SMALL)
    save(tmp_path / "model", config)
    cut(tmp_path / "model", SMALL["vocab"])
    to_gguf(tmp_path / "model", tmp_path / "model.gguf", GgufOptions())
    assert Checkpoint(tmp_path / "model.gguf").config.context == 64


@pytest.mark.parametrize("kind", ["q4_k_m", "q5_k_m", "q6_k"])
def test_types_that_cannot_be_made_are_refused_with_what_can(kind, tmp_path, capsys):
    save(tmp_path / "model", LLAMA)
    cut(tmp_path / "model", SMALL["vocab"])
    assert main(["gguf", str(tmp_path / "model"), str(tmp_path / "model.gguf"), "--type", kind]) == 2
    error = capsys.readouterr().err
    assert f"does not quantize to {kind[:4].upper()}" in error and "q8_0, q5_1, q5_0, q4_1, q4_0" in error
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1"])
def test_small_types_run_in_llama_cpp(kind, tmp_path, capsys):
    """The head keeps 8 bits; `down`, whose rows of 40 no block divides, is float16."""
    config = ModelConfig(family="llama", ffn=40, **SMALL)
    params = jax.tree.map(jnp.asarray, save(tmp_path / "model", config))
    cut(tmp_path / "model", SMALL["vocab"])
    assert main(["gguf", str(tmp_path / "model"), str(tmp_path / "model.gguf"), "--type", kind, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_quantized"] == config.layers
    file = Checkpoint(tmp_path / "model.gguf")
    types = {key: file.files[key].entries[key].dtype for key in file.files}
    assert types["lm_head.weight"] == "Q8_0" and types["model.layers.0.self_attn.q_proj.weight"] == kind.upper()
    assert types["model.layers.1.mlp.down_proj.weight"] == "F16" and types["model.norm.weight"] == "F32"
    ours_V = jax.nn.log_softmax(forward(config, params, jnp.asarray([TOKENS])).logits[0, -1])
    theirs_V = LlamaCpp(tmp_path / "model.gguf").log_probabilities(TOKENS, config.vocab)
    assert np.corrcoef(theirs_V, ours_V)[0, 1] > (0.9 if kind.startswith("q5") else 0.6)
