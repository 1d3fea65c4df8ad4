"""Next-token figures against float64 NumPy over whole logits."""

import jax
import numpy as np
import pytest

from nemoe_jax.model import next_token
from nemoe_jax.model.next_token import mean_figures, next_token_sums, unigram_loss

RNG = np.random.default_rng(3)
LOGITS, REFERENCE = RNG.normal(size=(2, 3, 12, 17)).astype(np.float32) * 3
TARGETS = RNG.integers(0, 17, (3, 12))
REAL = np.array([1, 1, 0], np.float32)  # the last sequence is filling


def log_softmax(logits):
    logits = np.float64(logits)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("chunk", [3, 12, 1000])
def test_figures_are_those_of_whole_logits(monkeypatch, chunk):
    monkeypatch.setattr(next_token, "CHUNK", chunk)
    same = lambda x: x  # noqa: E731
    sums = jax.jit(lambda *arrays: next_token_sums(*arrays[:2], same, arrays[2], same, arrays[3]))(
        TARGETS, REAL, LOGITS, REFERENCE
    )
    got = mean_figures([sums], 24, 2.0)
    q, p, targets = log_softmax(LOGITS[:2]), log_softmax(REFERENCE[:2]), TARGETS[:2]
    of = lambda log_p: -np.take_along_axis(log_p, targets[..., None], axis=-1).mean()  # noqa: E731
    expected = {
        "loss": of(q),
        "accuracy": (q.argmax(-1) == targets).mean(),
        "loss_unigram": 2.0,
        "kl_divergence": (np.exp(p) * (p - q)).sum(-1).mean(),
        "argmax_agreement": (q.argmax(-1) == p.argmax(-1)).mean(),
        "loss_dense": of(p),
        "accuracy_dense": (p.argmax(-1) == targets).mean(),
        "loss_above_dense": of(q) - of(p),
    }
    assert got.as_dict("dense") == pytest.approx(expected, rel=1e-5)
    assert got.destroyed == (of(q) > 2)


def test_without_a_reference_there_are_no_figures_about_it():
    sums = next_token_sums(TARGETS, REAL, lambda x: x, LOGITS)
    figures = mean_figures([sums, sums], 48, 99.0)
    assert set(figures.as_dict()) == {"loss", "accuracy", "loss_unigram"}
    assert not figures.destroyed and figures.verdict() == ""


def test_the_unigram_model_knows_frequencies_alone():
    corpus = np.array([0, 0, 0, 1])
    # 5 is not in the corpus, and counts as if it came once
    expected = -np.mean(np.log(np.array([3, 3, 1, 1]) / 5))
    assert unigram_loss(np.array([0, 0, 1, 5]), corpus) == pytest.approx(expected)


def test_what_is_no_number_counts_as_destroyed():
    assert next_token.NextTokenFigures(float("nan"), 0.0, 5.0).destroyed


@pytest.mark.parametrize(("reference", "named"), [(3.0, False), (None, False), (7.5, True), (float("nan"), True)])
def test_a_reference_that_knows_as_little_is_named(reference, named):
    verdict = next_token.NextTokenFigures(6.0, 0.0, 5.0, loss_reference=reference).verdict()
    assert verdict.startswith("the model is destroyed: its loss of 6.00 nats") and ("tokenizer" in verdict) == named
