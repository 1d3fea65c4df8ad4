"""GGUF files against llama.cpp itself: the same logits and greedy text; and against the tensors that they hold."""

import errno
import json
import os
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert.cli import main
from convert.gguf.export import GgufOptions, to_gguf
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.inference.generate import generate
from nemoe_jax.spec.config import ModelConfig
from tests.support.compiled import forward
from tests.support.configs import DENSE, NEKOMIND
from tests.support.llama_server import COMMON, MODELS, LlamaCpp, cut, save

PROMPT = [1, 300, 1200, 30, 500, 77]
NEW_TOKENS = 48


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """(config, parameters, directory) of a random model with a tokenizer smaller than its embedding."""
    directory = tmp_path_factory.mktemp(request.param) / "model"
    config = MODELS[request.param]
    params = save(directory, config)
    cut(directory, 1300)
    return config, params, directory


def test_llama_cpp_continues_as_we_do(model, tmp_path):
    config, params, directory = model
    to_gguf(directory, tmp_path / "model.gguf", GgufOptions())
    theirs = LlamaCpp(tmp_path / "model.gguf")
    params = jax.tree.map(jnp.asarray, params)
    ours = [int(token) for (token,) in generate(config, params, [PROMPT], NEW_TOKENS)]
    assert theirs.greedy(PROMPT, NEW_TOKENS) == ours
    tokens = PROMPT + ours
    logits_TV = forward(config, params, jnp.asarray([tokens])).logits[0]
    expected_V = jax.nn.log_softmax(logits_TV[-1])
    np.testing.assert_allclose(theirs.log_probabilities(tokens, config.vocab), expected_V, atol=2e-4)


@pytest.mark.parametrize(("kind", "tolerance"), [("bf16", 0.1), ("f16", 0.02), ("q8_0", 0.6)])
def test_other_types_are_near(kind, tolerance, moe, tmp_path):
    to_gguf(moe, tmp_path / "exact.gguf", GgufOptions())
    to_gguf(moe, tmp_path / "model.gguf", GgufOptions(type=kind))
    exact_V, near_V = (
        LlamaCpp(tmp_path / f"{name}.gguf").log_probabilities(PROMPT, COMMON["vocab"]) for name in ("exact", "model")
    )
    assert 0 < np.abs(near_V - exact_V).max() < tolerance


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_tensors_are_the_source_s_own(kind, moe, tmp_path):
    """Bit for bit; q8_0 within half a step of its blocks of 32, and the rounding of the step to float16."""
    to_gguf(moe, tmp_path / "model.gguf", GgufOptions(type=kind))
    config, source = MODELS["moe"], Checkpoint(moe)
    dtype = np.dtype({"f16": np.float16, "bf16": ml_dtypes.bfloat16}.get(kind, np.float32))
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}

    def check(name: str, values: np.ndarray, exact: bool = False) -> None:
        tensor = written.pop(name)
        assert tuple(tensor.shape) == values.shape[::-1], name
        if exact or kind == "f32":
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32, name
            np.testing.assert_array_equal(tensor.data, values)
        elif kind == "q8_0":
            blocks = values.reshape(-1, 32)
            off = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32) - blocks
            assert (np.abs(off) <= 0.57 * np.abs(blocks).max(axis=1, keepdims=True) / 127).all(), name
        else:
            np.testing.assert_array_equal(
                tensor.data.view(np.uint16).ravel(), values.astype(dtype).view(np.uint16).ravel()
            )

    check("token_embd.weight", source.view("model.embed_tokens.weight"))
    check("output_norm.weight", source.view("model.norm.weight"), exact=True)
    check("output.weight", source.view("lm_head.weight"))
    for layer in range(config.layers):
        prefix, name = f"model.layers.{layer}.", f"blk.{layer}."
        for heads, theirs, ours in ((config.heads, "attn_q", "q"), (config.kv_heads, "attn_k", "k")):
            rows = source.view(f"{prefix}self_attn.{ours}_proj.weight")
            half = config.head_dim // 2
            order = [head * 2 * half + i + side * half for head in range(heads) for i in range(half) for side in (0, 1)]
            check(f"{name}{theirs}.weight", rows[order])
        check(f"{name}attn_v.weight", source.view(f"{prefix}self_attn.v_proj.weight"))
        check(f"{name}attn_output.weight", source.view(f"{prefix}self_attn.o_proj.weight"))
        check(f"{name}attn_norm.weight", source.view(f"{prefix}input_layernorm.weight"), exact=True)
        check(f"{name}ffn_norm.weight", source.view(f"{prefix}post_attention_layernorm.weight"), exact=True)
        check(f"{name}ffn_gate_inp.weight", source.view(f"{prefix}block_sparse_moe.gate.weight"), exact=True)
        for theirs, ours in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            keys = [f"{prefix}block_sparse_moe.experts.{expert}.{ours}.weight" for expert in range(config.experts)]
            check(f"{name}ffn_{theirs}_exps.weight", np.stack([source.view(key) for key in keys]))
    assert not written


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    """A Mixtral directory with a tokenizer."""
    directory = tmp_path_factory.mktemp("moe") / "model"
    save(directory, MODELS["moe"])
    cut(directory, COMMON["vocab"])
    return directory


def test_the_command_reports_and_a_dry_run_writes_nothing(moe, tmp_path, capsys):
    target = tmp_path / "new" / "model.gguf"
    command = ["gguf", str(moe), str(target), "--type", "q8_0", "--json"]
    assert main([*command, "--dry-run"]) == 0
    assert not target.parent.exists()
    planned = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == planned | {"written": True}
    header = target.stat().st_size - planned["gigabytes"] * 1e9
    assert 0 < header < 100_000
    assert planned["tokens"] == COMMON["vocab"]
    assert list(target.parent.iterdir()) == [target]


def break_tensor(directory: Path, value: float) -> None:
    """Writes a value into a weight file, where nothing checks it."""
    with_tekken(MODELS["dense"])(directory)
    (file,) = set(Checkpoint(directory).files.values())
    entry = file.entries["model.layers.1.self_attn.q_proj.weight"]
    with file.path.open("r+b") as opened:
        opened.seek(entry.offset + 4 * 777)
        opened.write(np.float32(value).tobytes())


def with_tekken(config: ModelConfig, size: int = 1300):
    def make(directory: Path) -> None:
        save(directory, config)
        cut(directory, size)

    return make


NOT_FINITE = r"model\.layers\.1\.self_attn\.q_proj\.weight: NaN or infinite values in"
ERRORS = {
    "nan": (lambda directory: break_tensor(directory, np.nan), "bf16", NOT_FINITE + " bf16"),
    "infinity": (lambda directory: break_tensor(directory, -np.inf), "q8_0", NOT_FINITE + " q8_0"),
    "overflow": (lambda directory: break_tensor(directory, 1e6), "f16", NOT_FINITE + " f16"),
    "nekomind": (with_tekken(NEKOMIND), "auto", "not nekomind"),
    "no tokenizer": (lambda directory: save(directory, DENSE), "auto", "no tokenizer"),
    "too many tokens": (with_tekken(MODELS["dense"], 1401), "auto", "1401 tokens, but the embedding .* has 1400 rows"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_llama_cpp_could_not_read_is_refused(case, tmp_path):
    make, kind, message = ERRORS[case]
    make(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        to_gguf(tmp_path / "model", tmp_path / "new" / "model.gguf", GgufOptions(type=kind))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_file_stays_as_it_is(moe, tmp_path, capsys):
    (tmp_path / "model.gguf").write_text("mine")
    assert main(["gguf", str(moe), str(tmp_path / "model.gguf")]) == 2
    assert "model.gguf: exists already" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_leaves_nothing(moe, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="No space left"):
        to_gguf(moe, tmp_path / "new" / "model.gguf", GgufOptions())
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("nemoe_jax.utils.output_path.free_bytes", lambda target: 1000)
    with pytest.raises(UserError, match="GB of disk"):
        to_gguf(moe, tmp_path / "model.gguf", GgufOptions())
