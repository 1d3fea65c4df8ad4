"""Balanced clustering of neurons: against SciPy's exact assignment, planted clusters, and the invariants of a carve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from convert.carve.clustering import balanced_assignment, balanced_kmeans, contiguous, neuron_features, neuron_weights
from convert.carve.svd import right_subspace
from nemoe_jax.errors import UserError

KEY = jax.random.key(11)


def optimum(cost_FE):
    """The exact least cost: every group becomes F/E columns of a square assignment problem."""
    size = len(cost_FE) // cost_FE.shape[1]
    rows, columns = linear_sum_assignment(np.repeat(cost_FE, size, axis=1))
    return cost_FE[rows, columns // size].sum()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def distances(neurons, groups, rank, seed=0):
    rng = np.random.default_rng(seed)
    return 1 - unit(rng.normal(size=(neurons, rank))) @ unit(rng.normal(size=(groups, rank))).T


def heavy_tailed(neurons, groups, seed=1):
    rng = np.random.default_rng(seed)
    return distances(neurons, groups, 8, seed) * np.exp(2 * rng.normal(size=(neurons, 1)))


def skewed(neurons, groups, seed=2):
    """Every row prefers the same few groups, by far more than the rows differ."""
    return distances(neurons, groups, 8, seed) + 5 * np.arange(groups) ** 2


def tied(neurons, groups, seed=3):
    """Rows that are copies of one another, constant rows, and few distinct values."""
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 4, size=(neurons, groups)).astype(float)
    cost[: neurons // 3] = cost[0]
    cost[neurons // 3 : neurons // 2] = 1
    return cost


@pytest.mark.parametrize(
    "cost_FE",
    [
        distances(1008, 16, 64),
        heavy_tailed(1008, 16),
        skewed(1008, 16),
        tied(1008, 16),
        distances(1008, 16, 3) * 1e-20,
        distances(1008, 16, 3) * 1e20,
        distances(640, 64, 32),
        distances(12, 12, 4),
        distances(30, 1, 4),
    ],
    ids=["random", "tails", "skewed", "ties", "tiny", "huge", "64 groups", "one each", "one group"],
)
def test_assignment_costs_what_the_exact_solver_finds(cost_FE):
    neurons, groups = cost_FE.shape
    labels_F = np.asarray(balanced_assignment(jnp.asarray(cost_FE, jnp.float32)))
    assert np.array_equal(np.bincount(labels_F, minlength=groups), np.full(groups, neurons // groups))
    ours, exact = cost_FE[np.arange(neurons), labels_F].sum(), optimum(cost_FE)
    assert abs(ours - exact) <= 1e-6 * abs(exact)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_assignment_of_costs_that_are_not_finite_still_ends_and_is_balanced(bad):
    rng = np.random.default_rng(0)
    cost_FE = rng.random((1008, 16))
    cost_FE[rng.random((1008, 16)) < 0.5] = bad
    assert np.array_equal(np.bincount(balanced_assignment(jnp.asarray(cost_FE))), np.full(16, 63))


def assert_partition(assignment_EF, neurons, groups):
    assert assignment_EF.shape == (groups, neurons // groups)
    assert assignment_EF.dtype == jnp.int32
    assert np.array_equal(np.sort(np.ravel(assignment_EF)), np.arange(neurons))
    assert np.all(np.diff(assignment_EF, axis=1) > 0)


def objective(features_FR, assignment_EF):
    return np.linalg.norm(np.asarray(features_FR)[np.asarray(assignment_EF)].sum(1), axis=1).sum()


@pytest.mark.parametrize(
    "features_FR",
    [
        jax.random.normal(KEY, (210, 9)),
        jnp.zeros((210, 9)),
        jnp.ones((210, 9)),
        jnp.repeat(jax.random.normal(KEY, (3, 9)), 70, axis=0),
        jax.random.normal(KEY, (210, 9)).at[::3].set(0),
        jnp.concatenate([jnp.zeros((209, 9)), jnp.ones((1, 9))]),
    ],
    ids=["random", "all zero", "all equal", "three kinds", "a third zero", "one alive"],
)
def test_groups_are_equal_ascending_and_a_permutation(features_FR):
    assert_partition(balanced_kmeans(features_FR, 7, KEY), 210, 7)


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_recovered(seed):
    rng = np.random.default_rng(seed)
    planted_F = rng.permutation(np.repeat(np.arange(7), 30))
    features_FR = unit(rng.normal(size=(7, 9)))[planted_F] + 0.03 * rng.normal(size=(210, 9))
    assignment_EF = balanced_kmeans(jnp.asarray(features_FR), 7, jax.random.key(seed))
    assert np.all(planted_F[assignment_EF] == planted_F[assignment_EF[:, :1]])


def test_rounds_improve_the_objective_and_beat_contiguous_neurons():
    features_FR = jnp.asarray(unit(np.random.default_rng(0).normal(size=(210, 9))))
    after = [objective(features_FR, balanced_kmeans(features_FR, 7, KEY, iterations=rounds)) for rounds in (1, 4, 50)]
    assert objective(features_FR, contiguous(210, 7)) * 1.5 < after[0] < after[1] < after[2]


def test_converged_groups_are_the_best_assignment_to_their_own_centroids():
    features_FR = unit(np.random.default_rng(1).normal(size=(210, 9)))
    assignment_EF = np.asarray(balanced_kmeans(jnp.asarray(features_FR), 7, KEY, iterations=500))
    centroids_ER = unit(features_FR[assignment_EF].sum(1))
    labels_F = np.empty(210, int)
    labels_F[assignment_EF] = np.arange(7)[:, None]
    cost_FE = 1 - features_FR @ centroids_ER.T
    assert cost_FE[np.arange(210), labels_F].sum() <= optimum(cost_FE) * (1 + 1e-6)


def test_the_key_alone_decides():
    features_FR = jax.random.normal(KEY, (210, 9))
    first, again, other = (balanced_kmeans(features_FR, 7, jax.random.key(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    inside_jit = jax.jit(lambda features_FR: balanced_kmeans(features_FR, 7, jax.random.key(0)))(features_FR)
    assert_partition(inside_jit, 210, 7)


def test_weights_scale_the_rows():
    features_FR = jax.random.normal(KEY, (210, 9))
    weights_F = jnp.exp(jax.random.normal(jax.random.key(1), (210,)))
    weighted = balanced_kmeans(features_FR, 7, KEY, weights_F)
    assert np.array_equal(weighted, balanced_kmeans(features_FR * weights_F[:, None], 7, KEY))
    assert not np.array_equal(weighted, balanced_kmeans(features_FR, 7, KEY))


def test_signs_that_up_and_down_share_change_nothing():
    gate_key, up_key, down_key, sign_key = jax.random.split(KEY, 4)
    gate_FD, up_FD, down_FD = (jax.random.normal(key, (210, 14)) for key in (gate_key, up_key, down_key))
    sign_F1 = jax.random.rademacher(sign_key, (210, 1), jnp.float32)
    features_FR = neuron_features(gate_FD, right_subspace(gate_FD, 9, "randomized", KEY)[0])
    plain, flipped = (
        balanced_kmeans(features_FR, 7, KEY, neuron_weights(up_FD * sign, down_FD * sign)) for sign in (1, sign_F1)
    )
    assert np.array_equal(plain, flipped)
    expected_F = np.linalg.norm(up_FD, axis=1) * np.linalg.norm(down_FD, axis=1)
    assert np.allclose(neuron_weights(up_FD, down_FD), expected_F, rtol=1e-5)


def test_features_ignore_row_length_and_measure_the_cosine_to_the_subspace():
    subspace_DR = jnp.eye(5)[:, :2]
    gate_FD = jnp.array([[3.0, 4, 0, 0, 0], [0, 0, 7, 0, 0], [0, 5, 5, 0, 0], [0, 0, 0, 0, 0]])
    expected = [[0.6, 0.8], [0, 0], [0, 0.5**0.5], [0, 0]]
    assert np.allclose(neuron_features(gate_FD, subspace_DR), expected, atol=1e-6)
    assert np.allclose(neuron_features((100 * gate_FD).astype(jnp.bfloat16), subspace_DR), expected, atol=1e-2)


def test_contiguous_runs():
    assert np.array_equal(contiguous(6, 3), [[0, 1], [2, 3], [4, 5]])
    assert_partition(contiguous(210, 7), 210, 7)


@pytest.mark.parametrize("groups", [4, 0])
@pytest.mark.parametrize(
    "partition",
    [
        lambda groups: contiguous(210, groups),
        lambda groups: balanced_kmeans(jnp.ones((210, 9)), groups, KEY),
        lambda groups: balanced_assignment(jnp.ones((210, groups))),
    ],
    ids=["contiguous", "kmeans", "assignment"],
)
def test_groups_that_do_not_divide_are_refused_by_name(partition, groups):
    with pytest.raises(UserError, match=f"210 neurons do not divide into {groups} groups"):
        partition(groups)
