"""Experts chosen in groups: the fits against NumPy's least squares, the choice on text whose clusters are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.carve.calibration import LayerText
from convert.carve.gradient_refit import refit_by_gradient
from convert.carve.shared_gate import fit_gate
from convert.carve.token_clusters import OTHERS, Groups, _fit, _members, carve_token_clusters, measure_groups

CLUSTERS, HIDDEN, NEURONS, KEPT = 2, 10, 24, 12


def hidden_of(ffn, x):
    gate = x @ ffn["gate"]
    return gate / (1 + np.exp(-gate)) * (x @ ffn["up"])


@pytest.fixture(scope="module")
def text():
    """Tokens of two kinds, told apart by the sign of the first channel; each kind uses a half of the neurons."""
    random = np.random.default_rng(0)
    ffn = {name: random.normal(size=(HIDDEN, NEURONS)).astype(np.float32) for name in ("gate", "up")}
    ffn["gate"][0] = np.where(np.arange(NEURONS) % 2, 4, -4)
    ffn["down"] = random.normal(size=(NEURONS, HIDDEN)).astype(np.float32)
    inputs = [random.normal(size=(2, 96, HIDDEN)).astype(np.float32) for _ in range(3)]
    for x in inputs:
        x[..., 0] = 3 * np.where(random.random(x.shape[:2]) < 0.5, 1, -1)
    weights = [random.uniform(0.5, 2, x.shape[:2]).astype(np.float32) for x in inputs]
    arrays = [[jnp.asarray(part) for part in parts] for parts in (inputs, weights)]
    return LayerText(ffn, arrays[0], [jnp.asarray(hidden_of(ffn, x) @ ffn["down"]) for x in inputs], arrays[1])


def ffn_of(text, members, down):
    gate, up = (jnp.stack([text.ffn[name][:, kept] for kept in members]) for name in ("gate", "up"))
    return {"gate": gate, "up": up, "down": jnp.asarray(down, jnp.float32)}


def flat(parts):
    return np.concatenate([np.asarray(part, np.float64).reshape(-1, *part.shape[2:]) for part in parts])


def test_a_group_has_the_neurons_most_active_on_its_cluster_and_their_ridge_regression(text):
    labels = [(x[..., 1] > 0).astype(int) for x in text.inputs]
    ridge = 0.1
    members, down = _fit(text, text.hidden, labels, CLUSTERS, KEPT, ridge)
    hidden, wanted = hidden_of({k: np.float64(v) for k, v in text.ffn.items()}, flat(text.inputs)), flat(text.wanted)
    for cluster in range(CLUSTERS):
        weight = flat(text.weights) * ((flat(labels) == cluster) + OTHERS / CLUSTERS)
        activity = (weight[:, None] * hidden**2).sum(0) * (text.ffn["down"] ** 2).sum(1)
        kept = np.sort(np.argsort(-activity)[:KEPT])
        np.testing.assert_array_equal(members[cluster], kept)
        root = np.sqrt(weight)[:, None]
        pull = np.sqrt(ridge * np.mean(np.sum((root * hidden[:, kept]) ** 2, axis=0)))
        expected = np.linalg.lstsq(
            np.concatenate([root * hidden[:, kept], pull * np.eye(KEPT)]),
            np.concatenate([root * wanted, pull * text.ffn["down"][kept]]),
            rcond=None,
        )[0]
        np.testing.assert_allclose(down[cluster], expected, atol=1e-3 * np.abs(expected).max())


def test_what_two_groups_share_is_fitted_on_the_tokens_of_both(text):
    labels, ridge, shared, own = [(x[..., 0] > 0).astype(int) for x in text.inputs], 0.1, 4, 10
    members, down = _fit(text, text.hidden, labels, CLUSTERS, shared + own, ridge, shared)
    np.testing.assert_array_equal(members[0, :shared], members[1, :shared])
    assert sorted([*members[0], *members[1, shared:]]) == list(range(NEURONS))
    hidden, wanted = hidden_of({k: np.float64(v) for k, v in text.ffn.items()}, flat(text.inputs)), flat(text.wanted)
    order = np.r_[members[0], members[1, shared:]]
    rows, targets = [], []
    for cluster in range(CLUSTERS):
        root = np.sqrt(flat(text.weights) * ((flat(labels) == cluster) + OTHERS / CLUSTERS))[:, None]
        rows.append(root * np.where(np.isin(order, members[cluster]), hidden[:, order], 0))
        targets.append(root * wanted)
    pull = np.sqrt(ridge * np.mean(np.sum(np.concatenate(rows) ** 2, axis=0)))
    expected = np.linalg.lstsq(
        np.concatenate([*rows, pull * np.eye(NEURONS)]),
        np.concatenate([*targets, pull * text.ffn["down"][order]]),
        rcond=None,
    )[0]
    got = np.concatenate([down[0], down[1, shared:]])
    np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_array_equal(down[0, :shared], down[1, :shared])


def test_the_gate_of_a_shared_expert_finds_on_which_tokens_it_counts(text):
    """What is wanted is a known gate times the shared neurons, and the groups' own as they are."""
    gated, kinds = 8, [np.asarray(x[..., 0] > 0).astype(int) for x in text.inputs]
    members = np.stack([np.r_[:gated, gated + kind : NEURONS : 2] for kind in range(CLUSTERS)])
    ffn = ffn_of(text, members, [text.ffn["down"][kept] for kept in members])
    true = np.random.default_rng(2).normal(size=HIDDEN) / 2
    wanted = []
    for x, kind in zip(text.inputs, kinds, strict=True):
        hidden = hidden_of(text.ffn, np.asarray(x))
        share = np.isin(np.arange(NEURONS), members[0])[None] == (kind[..., None] == 0)
        share = np.where(np.arange(NEURONS) < gated, 2 / (1 + np.exp(-x @ true))[..., None], share)
        wanted.append(jnp.asarray((hidden * share) @ text.ffn["down"], jnp.float32))
    gate = np.asarray(fit_gate(dataclasses.replace(text, wanted=wanted), kinds, ffn, gated))
    assert gate @ true / np.linalg.norm(gate) / np.linalg.norm(true) > 0.9
    groups = Groups(members, jnp.eye(CLUSTERS, HIDDEN) * np.array([[-1.0], [0.0]]), ffn, gated, gated)
    errors = [
        measure_groups(dataclasses.replace(text, wanted=wanted), groups._replace(gate_D=row))["error_to_dense_stream"]
        for row in (None, jnp.asarray(gate), jnp.asarray(true, jnp.float32))
    ]
    assert errors[1] < 0.3 * errors[0]
    assert errors[2] < 1e-6


def test_groups_hold_the_most_active_neurons_in_common_and_then_their_own():
    activity = np.array([[9.0, 0, 5, 1, 4, 0], [9, 1, 0, 5, 4, 0], [9, 6, 0, 0, 4, 1]])
    np.testing.assert_array_equal(_members(activity, 3, 2), [[0, 4, 2], [0, 4, 3], [0, 4, 1]])
    np.testing.assert_array_equal(_members(activity, 2, 0), [[0, 2], [0, 3], [0, 1]])


def test_clusters_that_use_other_neurons_are_found(text):
    groups = carve_token_clusters(text, CLUSTERS, KEPT, 0.01, 0.02, jax.random.key(0))
    x = flat(text.inputs)
    choice = np.argmax(x @ np.asarray(groups.router_CD).T, axis=1)
    positive = int(np.mean(choice[x[:, 0] > 0]) > 0.5)
    assert np.mean((choice == positive) == (x[:, 0] > 0)) > 0.97
    np.testing.assert_array_equal(groups.members_CS[positive], np.arange(NEURONS)[1::2])
    np.testing.assert_array_equal(groups.members_CS[1 - positive], np.arange(NEURONS)[::2])
    logits = x @ np.asarray(groups.router_CD).T
    assert np.sqrt(np.mean((logits - logits.mean(1, keepdims=True)) ** 2)) == pytest.approx(0.02, rel=1e-3)
    assert measure_groups(text, groups)["error_to_dense_stream"] < 0.02


def test_the_figures_are_those_of_a_loop_over_tokens(text):
    random = np.random.default_rng(1)
    members = np.stack([np.sort(random.permutation(NEURONS)[:KEPT]) for _ in range(CLUSTERS)])
    router, down = random.normal(size=(CLUSTERS, HIDDEN)), random.normal(size=(CLUSTERS, KEPT, HIDDEN))
    got = measure_groups(text, Groups(members, jnp.asarray(router, jnp.float32), ffn_of(text, members, down)))
    chosen = best = total = plain = energy = 0.0
    load = np.zeros(CLUSTERS)
    for x, y, weight in zip(flat(text.inputs), flat(text.wanted), flat(text.weights), strict=True):
        hidden = hidden_of(text.ffn, x)
        errors = [np.sum((hidden[members[cluster]] @ down[cluster] - y) ** 2) for cluster in range(CLUSTERS)]
        cluster = int(np.argmax(router @ x))
        load[cluster] += 1
        chosen, best, total = chosen + weight * errors[cluster], best + weight * min(errors), total + weight * (y @ y)
        plain, energy = plain + errors[cluster], energy + y @ y
    assert got["error_to_dense_stream"] == pytest.approx(chosen / total, rel=1e-4)
    assert got["error_to_dense_stream_best_choice"] == pytest.approx(best / total, rel=1e-4)
    assert got["reconstruction_error"] == pytest.approx(plain / energy, rel=1e-4)
    assert got["load_max_over_mean"] == pytest.approx(load.max() / load.mean(), rel=1e-6)


def test_the_gradient_steps_fit_each_group_on_the_tokens_that_choose_it(text):
    """Two groups that start as the dense FFN of scaled outputs can both fit: each its own tokens' targets."""
    kinds = [np.asarray(x[..., 0] > 0).astype(int) for x in text.inputs]
    factor = np.array([0.5, -1.0])
    wanted = [jnp.asarray(y * factor[kind][..., None]) for y, kind in zip(text.wanted, kinds, strict=True)]
    both = dataclasses.replace(text, wanted=wanted)
    ffn = ffn_of(text, [np.arange(NEURONS)] * CLUSTERS, [0.8 * scale * text.ffn["down"] for scale in factor])
    groups = Groups(np.array([np.arange(NEURONS)] * 2), jnp.eye(CLUSTERS, HIDDEN) * np.array([[-1.0], [0.0]]), ffn)
    before = measure_groups(both, groups)["error_to_dense_stream"]
    refitted = groups._replace(ffn=refit_by_gradient(both, kinds, ffn, 200, jax.random.key(0)))
    assert before == pytest.approx(0.04, rel=1e-3)  # (1 - 0.8)²
    assert measure_groups(both, refitted)["error_to_dense_stream"] < 0.1 * before
    swapped = groups._replace(ffn=refit_by_gradient(both, [1 - kind for kind in kinds], ffn, 200, jax.random.key(0)))
    assert measure_groups(both, swapped)["error_to_dense_stream"] > before
