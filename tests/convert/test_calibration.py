"""The fits of a calibrated carve against NumPy's least squares."""

import jax.numpy as jnp
import numpy as np
import pytest

from convert.carve.calibration import (
    LayerText,
    distilled_router,
    measure,
    normal_equations,
    output_scale,
    ridge_solve,
    token_weights,
)

EXPERTS, TOP_K, HIDDEN, NEURONS = 4, 2, 10, 28


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def text(random):
    ffn = {name: random.normal(size=(HIDDEN, NEURONS)).astype(np.float32) for name in ("gate", "up")}
    ffn["down"] = random.normal(size=(NEURONS, HIDDEN)).astype(np.float32)
    inputs = [random.normal(size=(2, 33, HIDDEN)).astype(np.float32) for _ in range(3)]
    outputs = [hidden_of(ffn, x) @ ffn["down"] for x in inputs]
    return LayerText(ffn, inputs, outputs)


@pytest.fixture
def label(random):
    return random.permutation(np.arange(NEURONS) % EXPERTS)


def hidden_of(ffn, x):
    gate = x @ ffn["gate"]
    return gate / (1 + np.exp(-gate)) * (x @ ffn["up"])


def design(text, label, router):
    """Φ (tokens, neurons) and y (tokens, hidden), token by token."""
    rows, outputs = [], []
    for x in np.concatenate(text.inputs).reshape(-1, HIDDEN):
        logits = router @ x
        chosen = np.argsort(logits)[-TOP_K:]
        weights = np.zeros(EXPERTS)
        weights[chosen] = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        rows.append(hidden_of(text.ffn, x) * weights[label])
        outputs.append(hidden_of(text.ffn, x) @ text.ffn["down"])
    return np.array(rows), np.array(outputs)


def test_the_normal_equations_are_those_of_the_mixture(text, label, random):
    router = random.normal(size=(EXPERTS, HIDDEN)).astype(np.float32)
    phi, y = design(text, label, router)
    gram, moment = normal_equations(text, jnp.asarray(label), jnp.asarray(router), TOP_K)
    np.testing.assert_allclose(gram, phi.T @ phi / len(phi), atol=1e-5 * np.abs(gram).max())
    np.testing.assert_allclose(moment, phi.T @ y / len(phi), atol=1e-5 * np.abs(moment).max())


def test_the_output_scale_is_the_least_squares_one(text, label, random):
    router = random.normal(size=(EXPERTS, HIDDEN)).astype(np.float32)
    phi, y = design(text, label, router)
    gram, moment = normal_equations(text, jnp.asarray(label), jnp.asarray(router), TOP_K)
    got = output_scale(gram, moment, jnp.asarray(text.ffn["down"]), jnp.asarray(label), EXPERTS)
    columns = [((phi * (label == expert)) @ text.ffn["down"]).ravel() for expert in range(EXPERTS)]
    expected = np.linalg.lstsq(np.array(columns).T, y.ravel(), rcond=None)[0]
    np.testing.assert_allclose(got, expected, rtol=0.01)  # apart by the small ridge


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_the_refit_is_the_ridge_regression_towards_the_given_weights(text, label, random, ridge):
    router = random.normal(size=(EXPERTS, HIDDEN)).astype(np.float32)
    towards = random.normal(size=(NEURONS, HIDDEN)).astype(np.float32)
    phi, y = design(text, label, router)
    gram, moment = normal_equations(text, jnp.asarray(label), jnp.asarray(router), TOP_K)
    got = ridge_solve(gram, moment, ridge, jnp.asarray(towards))
    # as rows of a longer least-squares problem
    weight = np.sqrt(ridge * np.mean(phi**2) * len(phi))
    expected = np.linalg.lstsq(
        np.concatenate([phi, weight * np.eye(NEURONS)]), np.concatenate([y, weight * towards]), rcond=None
    )[0]
    np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())


def test_a_distilled_router_recalls_more_than_chance_and_a_refit_lowers_the_error(text, label, random):
    labels = jnp.asarray(label)
    down = jnp.asarray(text.ffn["down"])
    chance = jnp.asarray(random.normal(size=(EXPERTS, HIDDEN)).astype(np.float32))
    distilled = distilled_router(text, labels, EXPERTS, TOP_K, 0.02)
    before, after = (measure(text, labels, router, TOP_K * down, TOP_K) for router in (chance, distilled))
    assert after["recall"] > before["recall"] + 0.05
    gram, moment = normal_equations(text, labels, distilled, TOP_K)
    fitted = measure(text, labels, distilled, ridge_solve(gram, moment, 1e-3, TOP_K * down), TOP_K)
    assert fitted["reconstruction_error"] < after["reconstruction_error"]
    assert 1 <= fitted["load_max_over_mean"] <= EXPERTS / TOP_K


def test_the_figures_are_those_of_a_loop_over_tokens(text, label, random):
    router = random.normal(size=(EXPERTS, HIDDEN)).astype(np.float32)
    got = measure(text, jnp.asarray(label), jnp.asarray(router), jnp.asarray(TOP_K * text.ffn["down"]), TOP_K)
    phi, y = design(text, label, router)
    error = ((phi @ (TOP_K * text.ffn["down"]) - y) ** 2).sum() / (y**2).sum()
    recalled, load = 0, np.zeros(EXPERTS)
    for x, row in zip(np.concatenate(text.inputs).reshape(-1, HIDDEN), phi, strict=True):
        hidden = hidden_of(text.ffn, x)
        outputs = [np.linalg.norm((hidden * (label == expert)) @ text.ffn["down"]) for expert in range(EXPERTS)]
        chosen = {expert for expert in range(EXPERTS) if np.any(row[label == expert])}
        load[list(chosen)] += 1
        recalled += len(chosen & set(np.argsort(outputs)[-TOP_K:]))
    assert got["reconstruction_error"] == pytest.approx(error, rel=1e-4)
    assert got["recall"] == pytest.approx(recalled / TOP_K / len(phi), rel=1e-5)
    assert got["load_max_over_mean"] == pytest.approx(load.max() / load.mean(), rel=1e-5)


def test_neither_massive_tokens_nor_all_others_decide_a_fit_alone():
    """By the plain error one token of a size of 1000 has nearly all weight, by the relative one nearly none."""
    random = np.random.default_rng(0)
    streams, wanted = ([random.normal(size=(2, 50, 8)).astype(np.float32) for _ in range(2)] for _ in range(2))
    streams[0][0, 0] *= 1000
    wanted[0][0, 0] *= 1000
    weights = [
        np.asarray(weight) for weight in token_weights(*([jnp.asarray(x) for x in xs] for xs in (streams, wanted)))
    ]
    x, y, weight = np.concatenate(streams), np.concatenate(wanted), np.concatenate(weights)
    square, relative = (y**2).sum(-1), 1 / (x**2).mean(-1)
    np.testing.assert_allclose(weight, 1 + relative * square.sum() / (relative * square).sum(), rtol=1e-4)
    share = weight * square / (weight * square).sum()
    assert share[0, 0] == pytest.approx(0.5, abs=0.05)
