"""The commands as a user gives them."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.cli import main
from nemoe_jax.spec import schema
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.command_models import VOCABULARY, write_model
from tests.support.compiled import forward
from tests.support.configs import DENSE, MIXTRAL


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "moe")


def run(capsys, *arguments):
    status = main.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_inspect_prints_every_array_with_its_sharding(capsys):
    status, out, _ = run(capsys, "inspect", "nemoe-12b-16e", "--mesh", "fsdp=4,expert=4")
    assert status == 0
    line = next(line for line in out.splitlines() if line.startswith("blocks/moe/ffn/gate"))
    assert line.split() == [
        "blocks/moe/ffn/gate",
        "40×16×5120×896",
        "bfloat16",
        "layers",
        "experts",
        "embed",
        "expert_ffn",
        "-",
        "expert·fsdp",
        "-",
        "-",
        f"{40 * 5120 * 896 * 2:,}",
        f"{40 * 16 * 5120 * 896 * 2:,}",
    ]
    assert "12,251,059,200 parameters" in out


def test_inspect_as_json_adds_up(capsys, model):
    _, out, _ = run(capsys, "inspect", model, "--json")
    description = json.loads(out)
    assert description["bytes"] == sum(array["bytes"] for array in description["arrays"])
    assert description["bytes"] == 4 * description["params_total"]
    _, out, _ = run(capsys, "inspect", model, "--json", "--mesh", "expert=8")
    parts = {array["path"]: array["bytes"] // array["bytes_per_device"] for array in json.loads(out)["arrays"]}
    assert parts["blocks/moe/ffn/up"] == parts["blocks/moe/attn/q"] == 8 and parts["norm"] == 1


def test_logits_are_those_of_the_model(capsys, model, tmp_path):
    status, _, _ = run(capsys, "logits", model, "--tokens", "1,2,3", "--out", tmp_path / "logits.npy")
    assert status == 0
    config, params = pretrained.load_pretrained(model)
    expected = forward(config, params, jnp.asarray([[1, 2, 3]])).logits[0]
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["logits.npy"]


def test_perplexity_is_the_exponential_of_the_mean_loss(capsys, model, tmp_path):
    (tmp_path / "text.txt").write_text("Some text, not much of it, but enough for a window or two. " * 4)
    length = 24
    status, out, _ = run(
        capsys, "perplexity", model, tmp_path / "text.txt", "--sequence-length", length, "--batch-size", 3, "--json"
    )
    figures = json.loads(out)
    ids = load_tokenizer(model).encode_document((tmp_path / "text.txt").read_text())
    windows = (len(ids) - 1) // length
    starts = np.linspace(0, len(ids) - length - 1, windows).astype(int)
    config, params = pretrained.load_pretrained(model)
    losses = []
    for start in starts:
        window = np.array(ids[start : start + length + 1])
        log_p = jax.nn.log_softmax(forward(config, params, window[None, :-1]).logits[0])
        losses.append(-np.mean(np.asarray(log_p)[np.arange(length), window[1:]]))
    assert status == 0
    assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert figures["tokens"] == windows * length
    assert np.sum(figures["expert_load"], axis=1) == pytest.approx(np.ones(MIXTRAL.layers))


def test_generate_streams_what_it_reports(capsys, model):
    _, out, _ = run(capsys, "generate", model, "--prompt", "Hello", "--max-new-tokens", "5", "--json")
    figures = json.loads(out)
    assert figures["text"] == load_tokenizer(model).decode(figures["tokens"])
    assert len(figures["tokens"]) == 5
    _, streamed, _ = run(capsys, "generate", model, "--prompt", "Hello", "--max-new-tokens", "5")
    assert streamed == figures["text"] + "\n"


def test_generate_answers_a_chat(capsys, model, tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    (tmp_path / "chat.json").write_text(json.dumps(messages))
    _, ids, _ = run(capsys, "tokenize", model, "--chat", tmp_path / "chat.json")
    _, out, _ = run(capsys, "generate", model, "--chat", tmp_path / "chat.json", "--max-new-tokens", "2", "--json")
    assert json.loads(out)["prompt_tokens"] == len(json.loads(ids))


def test_tokenize_prints_ids_or_pieces(capsys, model, tmp_path):
    (tmp_path / "text").write_bytes("Grüße [INST]".encode())
    _, out, _ = run(capsys, "tokenize", model, tmp_path / "text")
    tokenizer = load_tokenizer(model)
    assert json.loads(out) == tokenizer.encode("Grüße [INST]")
    _, out, _ = run(capsys, "tokenize", model / "tekken.json", tmp_path / "text", "--pieces")
    assert "[INST]" not in json.loads(out)  # plain text, not the control token


def test_tokenize_reads_standard_input(model):
    done = subprocess.run(
        [sys.executable, "-m", "nemoe_jax.cli.main", "tokenize", str(model), "-"],
        input=b"abc",
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == load_tokenizer(model).encode("abc")


BAD = {
    "unknown preset": (["inspect", "nemoe-12b"], "did you mean nemoe-12b-16e"),
    "unknown mesh axis": (["inspect", "minitron-8b", "--mesh", "pipe=2"], "unknown axis 'pipe'"),
    "mesh does not divide": (["inspect", "nemoe-12b-16e", "--mesh", "expert=3"], "does not divide"),
    "no model": (["generate", "{tmp}/none", "--prompt", "x"], "no such directory"),
    "not a model": (["perplexity", "{tmp}", "{text}"], "no config.json"),
    "no text": (["perplexity", "{model}", "{tmp}/none.txt"], "no text there"),
    "empty text": (["perplexity", "{model}", "{empty}"], "empty text"),
    "too little text": (
        ["perplexity", "{model}", "{text}", "--sequence-length", "90"],
        "expected at least sequence length",
    ),
    "beyond the context": (
        ["perplexity", "{model}", "{text}", "--sequence-length", "97"],
        "expected 1 to the context of 96, got 97",
    ),
    "no devices": (["logits", "{model}", "--tokens", "1", "--out", "{tmp}/x", "--mesh", "fsdp=3"], "wants 3 devices"),
    "no ids": (["logits", "{model}", "--tokens", "one", "--out", "{tmp}/x"], "expected numbers"),
    "ids too large": (["logits", "{model}", "--tokens", "400", "--out", "{tmp}/x"], "expected ids from 0 to 399"),
    "nowhere to write": (["logits", "{model}", "--tokens", "1", "--out", "{tmp}/no/x"], "No such file or directory"),
    "no prompt length": (
        ["generate", "{model}", "--prompt", "x", "--max-new-tokens", "0"],
        "expected a positive number",
    ),
    "no chat": (["generate", "{model}", "--chat", "{text}"], "not a JSON file"),
    "too cold": (
        ["generate", "{model}", "--prompt", "x", "--temperature", "-1"],
        "temperature: expected a number from 0 to 100",
    ),
    "no such cache": (
        ["generate", "{model}", "--prompt", "x", "--kv-cache", "int4", "--max-new-tokens", "5"],
        "expected one of float32, bfloat16",
    ),
    "no tokenizer": (["tokenize", "{tmp}", "{text}"], "no tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_exit_status_2(capsys, model, tmp_path, name):
    (tmp_path / "text.txt").write_text("a little text")
    (tmp_path / "empty.txt").write_text(" \n")
    places = {"tmp": tmp_path, "model": model, "text": tmp_path / "text.txt", "empty": tmp_path / "empty.txt"}
    arguments, message = BAD[name]
    status, out, err = run(capsys, *(argument.format(**places) for argument in arguments))
    assert status == 2
    assert err.startswith("error: ") and message in err and err.count("\n") == 1, err
    assert out == ""
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "empty.txt"}


def test_a_backend_that_is_not_there(model):
    command = [
        sys.executable,
        "-m",
        "nemoe_jax.cli.main",
        "generate",
        str(model),
        "--prompt",
        "x",
        "--max-new-tokens",
        "5",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        pytest.skip("there is a GPU")
    assert done.returncode == 2
    assert "JAX_PLATFORMS=cuda: JAX finds no such backend here" in done.stderr and "Traceback" not in done.stderr


def test_debug_shows_the_traceback(capsys):
    for arguments in (["--debug", "inspect", "nowhere"], ["inspect", "nowhere", "--debug"]):
        status, _, err = run(capsys, *arguments)
        assert status == 2 and "Traceback" in err


@pytest.mark.parametrize("module", ["nemoe_jax.cli.main", "convert.cli", "train.cli"])
def test_help_names_every_sub_command(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    names = {
        "nemoe_jax.cli.main": [
            "inspect",
            "generate",
            "logits",
            "perplexity",
            "tokenize",
            "nemoe-convert",
            "nemoe-train",
        ],
        "convert.cli": ["carve", "verify"],
        "train.cli": ["run", "show", "recipes", "keys"],
    }[module]
    assert all(name in done.stdout for name in names)


def test_dense_models_report_no_load(capsys, model, tmp_path):
    config = DENSE.replace(vocab=VOCABULARY)
    pretrained.save_pretrained(
        tmp_path / "dense", config, schema.initialize(config, jax.random.key(0)), tokenizer_from=model
    )
    (tmp_path / "text.txt").write_text("Some text. " * 40)
    _, out, _ = run(
        capsys, "perplexity", tmp_path / "dense", tmp_path / "text.txt", "--sequence-length", "16", "--json"
    )
    figures = json.loads(out)
    assert {"loss", "perplexity", "accuracy", "loss_unigram", "tokens", "seconds"} <= set(figures)
    assert "load_max_over_mean" not in figures
