"""Perplexity by a sliding window, and scores of sequence ends, against plain loops over whole logits."""

import json
import math

import jax
import numpy as np
import pytest

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.cli.main import main
from nemoe_jax.errors import UserError
from nemoe_jax.evaluation import scoring
from nemoe_jax.evaluation.perplexity import sliding_windows
from nemoe_jax.evaluation.scoring import Ending, score
from nemoe_jax.model.transformer import forward
from nemoe_jax.spec import schema
from nemoe_jax.spec.mesh import make_mesh
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.configs import DENSE, MIXTRAL, write_tokenizer

RNG = np.random.default_rng(11)
LOGITS = jax.jit(lambda config, params, tokens: forward(config, params, tokens).logits, static_argnums=0)


def log_probabilities(config, params, tokens):
    """log p of every token but the first given those before it, one forward pass of the full context's length."""
    padded = np.zeros((1, config.context), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(LOGITS(config, params, padded))[0, : len(tokens) - 1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return log_p[np.arange(len(tokens) - 1), tokens[1:]], log_p.argmax(axis=1) == tokens[1:]


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 14, 15, 40])
@pytest.mark.parametrize("window, stride", [(10, 5), (10, 1), (10, 9), (10, 4), (2, 1)])
def test_windows_score_each_token_once_with_enough_before_it(length, window, stride):
    scored = []
    for start, end, count in sliding_windows(length, window, stride):
        assert end - start <= window
        scored += range(end - count, end)
        assert end - count - start >= (1 if start == 0 else window - stride)
    assert scored == list(range(1, length))


@pytest.mark.parametrize("config", [DENSE, MIXTRAL], ids=lambda config: config.family)
def test_scores_are_those_of_whole_logits(config, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 7)  # so that there are several
    params = schema.initialize(config, jax.random.key(1))
    common = RNG.integers(0, 72, 20)
    endings = [
        Ending(RNG.integers(0, 72, length).astype(np.int32), last) for length, last in [(2, 1), (30, 29), (61, 4)]
    ]
    endings += [Ending(np.append(common, option).astype(np.int32), last) for option, last in [(5, 1), (6, 1), (6, 9)]]
    for ending, found in zip(endings, score(config, params, endings, batch_size=2), strict=True):
        expected, greedy = log_probabilities(config, params, ending.tokens)
        np.testing.assert_allclose(found.logprobs, expected[-ending.last :], atol=1e-5)
        np.testing.assert_array_equal(found.greedy, greedy[-ending.last :])


def test_what_is_likeliest_is_called_greedy():
    params = schema.initialize(DENSE, jax.random.key(1))
    tokens = np.array([4, 5, 6], np.int32)
    likeliest = int(np.asarray(LOGITS(DENSE, params, np.resize(tokens, (1, 96))))[0, 2].argmax())
    found = score(DENSE, params, [Ending(np.append(tokens, one).astype(np.int32), 1) for one in (likeliest, 0)])
    assert [one.greedy.tolist() for one in found] == [[True], [likeliest == 0]]


def test_scores_on_a_mesh_are_those_without():
    params = schema.initialize(DENSE, jax.random.key(1))
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    endings = [Ending(RNG.integers(0, 72, length).astype(np.int32), 3) for length in (7, 30, 31)]
    for one, other in zip(score(DENSE, params, endings, 4, mesh), score(DENSE, params, endings, 4), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_equal_inputs_share_a_pass(monkeypatch):
    shapes = []
    original = scoring._hidden
    monkeypatch.setattr(scoring, "_hidden", lambda *given: shapes.append(given[2].shape) or original(*given))
    params = schema.initialize(DENSE, jax.random.key(1))
    score(DENSE, params, [Ending(np.array([1, 2, 3, option], np.int32), 1) for option in range(40)], batch_size=4)
    assert shapes == [(1, 32)]


@pytest.mark.parametrize("tokens, last", [([1], 1), ([1, 2], 2), ([1, 2], 0), ([1] * 98, 1)])
def test_nothing_to_score_is_refused(tokens, last):
    with pytest.raises(UserError, match=f"got {len(tokens)} and {last}"):
        score(DENSE, {}, [Ending(np.array(tokens, np.int32), last)])


@pytest.mark.parametrize("token", [-1, 72])
def test_tokens_without_a_row_are_refused(token):
    with pytest.raises(UserError, match="expected tokens from 0 to 71"):
        score(DENSE, {}, [Ending(np.array([1, token], np.int32), 1)])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "dense"
    pretrained.save_pretrained(directory, DENSE, schema.initialize(DENSE, jax.random.key(1)))
    write_tokenizer(directory)
    text = " ".join(f"word{number}" for number in RNG.integers(0, 69, 150))
    (directory.parent / "text.txt").write_text(text)
    return directory


@pytest.mark.parametrize("window, stride", [(32, 8), (96, 48)])
def test_sliding_perplexity_is_that_of_a_plain_loop(directory, capsys, window, stride):
    text = directory.parent / "text.txt"
    flags = [] if stride == window // 2 else ["--stride", str(stride)]
    assert main(["perplexity", str(directory), str(text), "--window", str(window), *flags, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    config, params = pretrained.load_pretrained(directory)
    ids = np.array(load_tokenizer(directory).encode_document(text.read_text()))
    losses = []
    reached = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        log_p, _ = log_probabilities(config, params, ids[begin:end])
        losses += list(-log_p[-(end - reached) :])
        reached = end
        if end == len(ids):
            break
    assert figures["tokens"] == len(losses) == len(ids) - 1
    assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))


def test_a_model_is_compared_with_its_reference(directory, tmp_path, capsys):
    config = MIXTRAL.replace(vocab=DENSE.vocab)
    params = schema.initialize(config, jax.random.key(2))
    pretrained.save_pretrained(tmp_path / "moe", config, params)
    write_tokenizer(tmp_path / "moe")
    text = str(directory.parent / "text.txt")
    flags = ["--sequence-length", "32", "--batch-size", "3", "--json"]
    assert main(["perplexity", str(tmp_path / "moe"), text, "--reference", str(directory), *flags]) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    ids = np.array(load_tokenizer(directory).encode_document((directory.parent / "text.txt").read_text()))
    starts = np.linspace(0, len(ids) - 33, (len(ids) - 1) // 32).astype(int)
    windows = np.stack([ids[start : start + 33] for start in starts]).astype(np.int32)
    log_p, log_q = (
        np.float64(jax.nn.log_softmax(LOGITS(*model, windows[:, :-1])))
        for model in (pretrained.load_pretrained(directory), (config, params))
    )
    loss, loss_reference = (-np.take_along_axis(log, windows[:, 1:, None], axis=-1).mean() for log in (log_q, log_p))
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["loss_above_reference"] == pytest.approx(loss - loss_reference, abs=1e-5)
    assert figures["kl_divergence"] == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-4)
    assert figures["argmax_agreement"] == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).mean())
    assert figures["accuracy"] == pytest.approx((log_q.argmax(-1) == windows[:, 1:]).mean())
    counts = np.bincount(ids, minlength=config.vocab)
    unigram = -np.log(counts[windows[:, 1:]] / (len(ids) + 1)).mean()
    assert figures["loss_unigram"] == pytest.approx(unigram)
    assert figures["destroyed"] == (loss > unigram) and ("destroyed" in printed.err) == (loss > unigram)


@pytest.mark.parametrize("how", [["--sequence-length", "32"], ["--window", "32"]])
def test_several_models_are_measured_as_each_alone(directory, tmp_path, capsys, how):
    config = MIXTRAL.replace(vocab=DENSE.vocab)
    pretrained.save_pretrained(tmp_path / "moe", config, schema.initialize(config, jax.random.key(2)))
    write_tokenizer(tmp_path / "moe")
    text, models = str(directory.parent / "text.txt"), [str(directory), str(tmp_path / "moe")]
    flags = [text, *how, "--json", *(["--reference", str(directory)] if "--window" not in how else [])]
    alone = []
    for model in models:
        assert main(["perplexity", model, *flags]) == 0
        alone.append(json.loads(capsys.readouterr().out) | {"model": model})
    assert main(["perplexity", models[0], *flags, "--also", models[1]]) == 0
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one | {"seconds": 0} for one in together] == [one | {"seconds": 0} for one in alone]
    if "--window" not in how:
        assert together[0]["loss_above_reference"] == 0 and together[0]["argmax_agreement"] == 1


@pytest.mark.parametrize("flag", ["--reference", "--also"])
def test_another_vocabulary_is_refused(directory, tmp_path, capsys, flag):
    config = DENSE.replace(vocab=80)
    pretrained.save_pretrained(tmp_path / "other", config, schema.initialize(config, jax.random.key(2)))
    text = str(directory.parent / "text.txt")
    assert main(["perplexity", str(directory), text, flag, str(tmp_path / "other")]) == 2
    assert "expected" in (error := capsys.readouterr().err) and "vocabulary of 72, got 80" in error


ERRORS = {
    "reference in windows": (["--window", "8", "--reference", "x"], "--reference: only with neither"),
    "window beyond the context": (["--window", "97"], "window: expected 2 to the context of 96 tokens, got 97"),
    "window of one": (["--window", "1"], "window: expected 2 to"),
    "stride as large as the window": (["--window", "8", "--stride", "8"], "stride: expected 1 to 7"),
    "stride of nothing": (["--stride", "8"], "--stride: only with --window"),
    "two ways at once": (["--window", "8", "--sequence-length", "8"], "--sequence-length: only with neither"),
    "no batches": (["--batches", "0"], "--batches: expected a positive number, got 0"),
    "depths of nothing": (["--depths", "8"], "--depths: only with --needle"),
    "cache of a needle": (
        ["--needle", "--lengths", "90", "--kv-cache", "int3"],
        "cache dtype: expected one of float32",
    ),
    "needle in windows": (["--needle", "--window", "8"], "--window: only with no --needle"),
}


@pytest.mark.parametrize("flags, message", ERRORS.values(), ids=ERRORS.keys())
def test_bad_flags_are_one_line(directory, capsys, flags, message):
    assert main(["perplexity", str(directory), str(directory.parent / "text.txt"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
