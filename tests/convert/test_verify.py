"""Figures of two models against NumPy, and against the losses of `evaluate`."""

import json
import re

import jax
import numpy as np
import pytest

from convert import cli
from convert.carve.carve import CarveOptions, carve
from convert.verify.logits import compare, our_logits
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.evaluation.perplexity import evaluate
from nemoe_jax.spec import schema
from nemoe_jax.text.corpus import spaced_batches, tokenize_corpus
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.configs import DENSE

tokenizers = pytest.importorskip("tokenizers")

VOCABULARY = DENSE.vocab


def write_tokenizer(directory, vocabulary):
    """A tokenizer of single letters, as many as the vocabulary asks for."""
    letters = {chr(ord("0") + number): number for number in range(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "1"}))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A dense model with a tokenizer, its carved one, a copy with one weight changed, others that do not fit."""
    root = tmp_path_factory.mktemp("models")
    params = schema.initialize(DENSE, jax.random.key(0))
    pretrained.save_pretrained(root / "dense", DENSE, params)
    write_tokenizer(root / "dense", VOCABULARY)
    carve(root / "dense", root / "carved", CarveOptions(experts=4, top_k=2))
    embedding = params["embed"]
    pretrained.save_pretrained(
        root / "vocabulary",
        DENSE.replace(vocab=80),
        params
        | {"embed": np.resize(embedding, (80, DENSE.hidden)), "head": np.resize(params["head"], (DENSE.hidden, 80))},
    )
    pretrained.save_pretrained(root / "short", DENSE.replace(context=16), params)
    write_tokenizer(root / "short", 80)
    params["norm"] = params["norm"].at[3].multiply(1.001)
    pretrained.save_pretrained(root / "touched", DENSE, params)
    letters = np.random.default_rng(0).integers(2, VOCABULARY, 700)
    (root / "text.txt").write_text("".join(chr(ord("0") + number) for number in letters))
    (root / "short.txt").write_text("5678")
    (root / "other.txt").write_text("567" + chr(ord("0") + 79))
    return root


def reference(a, b, targets):
    """KL per token, and losses, in float64."""
    log_p, log_q = (
        logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for logits in (a.astype(np.float64), b.astype(np.float64))
    )
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    picked = [-np.mean([log[i, t, targets[i, t]] for i, t in np.ndindex(targets.shape)]) for log in (log_p, log_q)]
    return kl, picked


def test_figures_are_those_of_numpy():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 5, 11)).astype(np.float32)
    b = (a + 0.5 * rng.normal(size=a.shape)).astype(np.float32)
    targets = rng.integers(0, 11, (3, 5))
    result = compare(a, b, 1e-4, targets)
    kl, losses = reference(a, b, targets)
    assert result.max_difference == np.abs(a - b).max()
    assert result.argmax_agreement == np.mean(a.argmax(-1) == b.argmax(-1)) < 1
    assert result.tokens == 15 and not result.agrees
    expected = [a.std(), kl.mean(), kl.max(), *losses]
    got = [result.logit_std, result.kl_divergence, result.kl_max, result.loss_a, result.loss_b]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert result.kl_divergence != pytest.approx(compare(b, a, 1e-4).kl_divergence, rel=1e-3)  # KL(A ‖ B)
    assert compare(a, b, 1e-4).loss_a is None


@pytest.mark.parametrize("place", [(0, 0, 0), (2, 4, 10)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_never_agree(place, value):
    a = np.zeros((3, 5, 11), np.float32)
    b = a.copy()
    b[place] = value
    assert compare(a, a, 1e-4).agrees
    assert not compare(a, b, 1e9).agrees
    assert not compare(b, a, 1e9).agrees
    assert not compare(b, b, 1e9).agrees


def test_the_tolerance_is_relative_to_the_standard_deviation():
    a = np.random.default_rng(0).normal(size=(1, 4, 11)).astype(np.float32) * 100
    assert compare(a, a + 5e-3, 1e-4).agrees  # of about 1e-2
    assert not compare(a / 1e3, a / 1e3 + 5e-4, 1e-4).agrees  # small logits count as of deviation 1


@pytest.mark.parametrize(("other", "status"), [("dense", 0), ("touched", 1), ("carved", 1)])
def test_two_directories(other, status, directories, capsys):
    assert (
        cli.main(["verify", str(directories / "dense"), str(directories / other), "--tokens", "24", "--json"]) == status
    )
    figures = json.loads(capsys.readouterr().out)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 24))
    a, b = (our_logits(directories / name, ids) for name in ("dense", other))
    kl, _ = reference(a, b, ids)
    np.testing.assert_allclose(figures["kl_divergence"], kl.mean(), rtol=1e-6)
    np.testing.assert_allclose(figures["kl_max"], kl.max(), rtol=1e-6)
    assert figures["max_difference"] == np.abs(a - b).max()
    assert (figures["max_difference"] == 0) == (other == "dense")
    assert figures["tokens"] == 48 and "loss_a" not in figures
    loose = ["--tokens", "24", "--tolerance", "100"]
    assert cli.main(["verify", str(directories / "dense"), str(directories / other), *loose]) == 0


def test_losses_on_text_are_those_of_evaluate(directories, capsys):
    arguments = ["verify", str(directories / "dense"), str(directories / "carved"), "--json", "--tokens", "24"]
    assert cli.main([*arguments, "--sequences", "8", "--text", str(directories / "text.txt")]) == 1
    figures = json.loads(capsys.readouterr().out)
    stream = tokenize_corpus([str(directories / "text.txt")], load_tokenizer(directories / "dense"))
    batches = spaced_batches(stream, 24, 4, 2)
    for name, directory in (("loss_a", "dense"), ("loss_b", "carved")):
        expected = evaluate(*pretrained.load_pretrained(directories / directory), batches)
        assert figures[name] == pytest.approx(expected.loss, rel=1e-5)
        assert figures["tokens"] == expected.tokens == 8 * 24
    assert figures["loss_a"] != pytest.approx(figures["loss_b"], rel=1e-3)


BAD = {
    "vocabulary": (["dense", "vocabulary"], "vocabulary: expected the vocabulary of .*dense, 72 tokens, got 80"),
    "no directory": (["dense", "nowhere"], "nowhere: no such directory"),
    "no model": (["dense", "."], "not a model directory: no config.json"),
    "neither": (["nowhere"], "nowhere: no such directory"),
    "context": (["dense", "short", "--tokens", "17"], "--tokens: expected 1 to the context of 16, got 17"),
    "no tokens": (["dense", "short", "--tokens", "0"], "--tokens: expected 1 to the context of 16, got 0"),
    "sequences": (["dense", "short", "--tokens", "4", "--sequences", "0"], "--sequences: expected a positive number"),
    "no tokenizer": (["touched", "dense", "--text", "text.txt"], "touched: no tokenizer"),
    "another tokenizer": (["short", "dense", "--tokens", "4", "--text", "other.txt"], "gives token 79; the model"),
    "no text": (["dense", "dense", "--text", "nothing.txt"], "no text there"),
    "short text": (["dense", "dense", "--text", "short.txt"], "expected at least sequence length"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(arguments, message, directories, capsys, monkeypatch):
    monkeypatch.chdir(directories)
    assert cli.main(["verify", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
