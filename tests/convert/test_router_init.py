"""Weights-only routers: orthonormal rows as stored, small logits, and the choice they make."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.carve.clustering import contiguous
from convert.carve.router_init import default_temperature, expert_directions, polar_router, random_orthogonal_router
from nemoe_jax.errors import UserError

KEY = jax.random.key(7)
EXPERTS, HIDDEN, NEURONS = 6, 40, 54


def top_k_weights(logits, k):
    """Softmax over the chosen k of each row, zero elsewhere: NumPy, float64."""
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    exponentials = np.exp(np.take_along_axis(logits, chosen, 1) - logits.max(1, keepdims=True))
    weights = np.zeros_like(logits)
    np.put_along_axis(weights, chosen, exponentials / exponentials.sum(1, keepdims=True), 1)
    return weights


def gates(seed=0):
    """Gate rows in planted groups that all lean one way, as trained ones do, and an uneven norm weight."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(EXPERTS, HIDDEN)) + 0.5 * rng.normal(size=HIDDEN)
    gate_FD = np.repeat(centers, NEURONS // EXPERTS, axis=0) + 0.3 * rng.normal(size=(NEURONS, HIDDEN))
    return gate_FD.astype(np.float32), np.exp(rng.normal(size=HIDDEN)).astype(np.float32)


def normalized_inputs(tokens, norm_D, seed=1):
    x = np.random.default_rng(seed).normal(size=(tokens, len(norm_D)))
    return x / np.sqrt(np.mean(x**2, axis=1, keepdims=True)) * norm_D


@pytest.mark.parametrize("weighted", [False, True])
def test_directions_are_the_unit_means_of_their_neurons(weighted):
    gate_FD, _ = gates()
    assignment_EF = np.random.default_rng(2).permutation(NEURONS).reshape(EXPERTS, -1)
    weights_F = np.random.default_rng(3).random(NEURONS).astype(np.float32) if weighted else np.ones(NEURONS)
    expected = np.stack([np.average(gate_FD[members], axis=0, weights=weights_F[members]) for members in assignment_EF])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    ours = expert_directions(
        jnp.asarray(gate_FD), jnp.asarray(assignment_EF), jnp.asarray(weights_F) if weighted else None
    )
    assert np.allclose(ours, expected, atol=1e-6)


def test_dead_experts_have_a_zero_direction_and_yet_an_orthonormal_router():
    gate_FD, _ = gates()
    gate_FD[:9] = 0
    directions_ED = expert_directions(jnp.asarray(gate_FD), contiguous(NEURONS, EXPERTS))
    assert np.all(directions_ED[0] == 0)
    router_ED = polar_router(directions_ED, 1.0)
    assert np.allclose(router_ED @ router_ED.T, np.eye(EXPERTS), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("temperature", [3e-4, 0.5])
def test_stored_routers_have_orthogonal_rows_of_length_temperature(dtype, temperature):
    gate_FD, _ = gates()
    directions_ED = expert_directions(jnp.asarray(gate_FD, dtype), contiguous(NEURONS, EXPERTS))
    for router_ED in (
        polar_router(directions_ED, temperature),
        random_orthogonal_router(KEY, EXPERTS, HIDDEN, temperature),
    ):
        assert router_ED.shape == (EXPERTS, HIDDEN)
        assert router_ED.dtype == jnp.float32
        gram = np.asarray(router_ED, np.float64) @ np.asarray(router_ED, np.float64).T
        assert np.allclose(gram, temperature**2 * np.eye(EXPERTS), atol=1e-5 * temperature**2)


def test_with_the_norm_weight_the_rows_are_orthonormal_after_folding():
    gate_FD, norm_D = gates()
    norm_D[3] = 0
    directions_ED = expert_directions(jnp.asarray(gate_FD), contiguous(NEURONS, EXPERTS))
    router_ED = np.asarray(polar_router(directions_ED, 0.5, jnp.asarray(norm_D)))
    folded_ED = router_ED * norm_D
    assert np.allclose(folded_ED @ folded_ED.T, 0.25 * np.eye(EXPERTS), atol=1e-5)
    assert np.all(router_ED[:, 3] == 0)
    constant_D = jnp.full(HIDDEN, 2.0)
    assert np.allclose(2 * polar_router(directions_ED, 0.5, constant_D), polar_router(directions_ED, 0.5), atol=1e-5)


def test_the_router_sends_a_token_to_the_expert_whose_gates_it_opens():
    gate_FD, norm_D = gates()
    gate_FD /= norm_D  # trained gates undo the norm weight's unevenness
    assignment_EF = contiguous(NEURONS, EXPERTS)
    inputs_TD = normalized_inputs(2000, norm_D)
    openings_TE = (inputs_TD @ gate_FD.T)[:, np.asarray(assignment_EF)].mean(-1)
    directions_ED = expert_directions(jnp.asarray(gate_FD), assignment_EF)
    hits = np.mean(np.argmax(inputs_TD @ polar_router(directions_ED, 0.01).T, 1) == np.argmax(openings_TE, 1))
    control = random_orthogonal_router(KEY, EXPERTS, HIDDEN, 0.01)
    assert hits > 0.6
    assert np.mean(np.argmax(inputs_TD @ control.T, 1) == np.argmax(openings_TE, 1)) < 0.35


def test_default_temperature_sets_the_deviation_of_the_logits():
    _, norm_D = gates()
    inputs_TD = normalized_inputs(2000, norm_D)
    # the average over random rows; any one row may lie on heavy or light channels
    logits = [
        inputs_TD @ random_orthogonal_router(jax.random.key(seed), EXPERTS, HIDDEN, default_temperature(norm_D, 0.03)).T
        for seed in range(20)
    ]
    assert np.isclose(np.sqrt(np.mean(np.square(logits))), 0.03, rtol=0.05)
    assert default_temperature(jnp.zeros(HIDDEN), 0.03) == np.float32(0.03)


def test_a_small_temperature_levels_the_weights_but_keeps_the_choice():
    gate_FD, norm_D = gates()
    inputs_TD = normalized_inputs(500, norm_D)
    directions_ED = expert_directions(jnp.asarray(gate_FD), contiguous(NEURONS, EXPERTS))
    small = np.asarray(inputs_TD @ polar_router(directions_ED, default_temperature(norm_D)).T, np.float64)
    large = np.asarray(inputs_TD @ polar_router(directions_ED, 1.0).T, np.float64)
    weights = top_k_weights(small, 4)
    assert np.array_equal(weights > 0, top_k_weights(large, 4) > 0)
    assert np.all(np.abs(weights[weights > 0] - 0.25) < 0.25 * 0.1)


def test_one_vector_added_to_every_row_changes_no_weight():
    gate_FD, norm_D = gates()
    inputs_TD = normalized_inputs(500, norm_D)
    router_ED = np.asarray(
        polar_router(expert_directions(jnp.asarray(gate_FD), contiguous(NEURONS, EXPERTS)), 0.1), np.float64
    )
    shift_D = np.random.default_rng(9).normal(size=HIDDEN)
    before, after = (top_k_weights(inputs_TD @ rows.T, 4) for rows in (router_ED, router_ED + shift_D))
    assert np.allclose(before, after, atol=1e-9)


def test_random_router_follows_the_key():
    first, again, other = (random_orthogonal_router(jax.random.key(seed), 5, 9, 1.0) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_bad_sizes_and_temperatures_are_refused():
    with pytest.raises(UserError, match="at most 4 rows of length 4, got 5"):
        random_orthogonal_router(KEY, 5, 4, 1.0)
    with pytest.raises(UserError, match="positive number, got 0"):
        default_temperature(jnp.ones(4), 0)
