"""The SVDs of carving against NumPy's, on shapes where a transposition cannot pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.carve.svd import METHODS, polar, right_subspace
from nemoe_jax.errors import UserError

KEY = jax.random.key(3)


def with_spectrum(rows, columns, values, seed=0):
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(rows, len(values))))
    right, _ = np.linalg.qr(rng.normal(size=(columns, len(values))))
    return ((left * values) @ right.T).astype(np.float32)


def cosines(a, b):
    """Cosines of the principal angles between the column spaces of two matrices with orthonormal columns."""
    return np.linalg.svd(np.asarray(a, np.float64).T @ np.asarray(b, np.float64), compute_uv=False)


@pytest.mark.parametrize(("rows", "columns"), [(90, 40), (40, 90)])
def test_exact_is_numpys(rows, columns):
    matrix = with_spectrum(rows, columns, 0.8 ** np.arange(40))
    _, values, right = np.linalg.svd(matrix.astype(np.float64))
    vectors_DR, values_R = right_subspace(jnp.asarray(matrix), 7, "exact", KEY)
    assert vectors_DR.shape == (columns, 7)
    assert np.allclose(values_R, values[:7], atol=1e-5)
    assert np.allclose(np.abs(np.sum(vectors_DR.T * right[:7], axis=1)), 1, atol=1e-5)  # up to sign, one by one


@pytest.mark.parametrize(("rows", "columns"), [(300, 120), (120, 300)])
def test_randomized_finds_the_subspace_of_a_decaying_spectrum(rows, columns):
    matrix = with_spectrum(rows, columns, (1 + np.arange(120.0)) ** -0.7)
    _, values, right = np.linalg.svd(matrix.astype(np.float64))
    vectors_DR, values_R = right_subspace(jnp.asarray(matrix), 20, "randomized", KEY)
    assert np.allclose(vectors_DR.T @ vectors_DR, np.eye(20), atol=1e-5)
    assert np.all(cosines(vectors_DR[:, :10], right[:20].T) > 0.999)
    captured = np.sum((matrix @ np.asarray(vectors_DR)) ** 2) / np.sum(values[:20] ** 2)
    assert 0.998 < captured <= 1 + 1e-6
    assert np.allclose(values_R[:10], values[:10], rtol=2e-3)


def test_power_iterations_are_what_makes_a_slow_decay_work():
    matrix = with_spectrum(300, 120, (1 + np.arange(120.0)) ** -0.4)
    _, values, _ = np.linalg.svd(matrix.astype(np.float64))

    def captured(power_iterations):
        vectors, _ = right_subspace(jnp.asarray(matrix), 20, "randomized", KEY, power_iterations=power_iterations)
        return np.sum((matrix @ np.asarray(vectors)) ** 2) / np.sum(values[:20] ** 2)

    assert captured(0) < captured(2) - 0.01


@pytest.mark.parametrize("method", METHODS)
def test_low_rank_is_found_exactly_and_completed_orthonormally(method):
    matrix = with_spectrum(200, 60, np.array([5.0, 4.0, 3.0, 2.0]))
    matrix[150:] = 0  # dead neurons
    vectors_DR, values_R = right_subspace(jnp.asarray(matrix), 9, method, KEY)
    assert np.allclose(vectors_DR.T @ vectors_DR, np.eye(9), atol=1e-5)
    assert np.all(values_R[4:] < 1e-5)
    projected = matrix @ np.asarray(vectors_DR[:, :4]) @ np.asarray(vectors_DR[:, :4]).T
    assert np.allclose(projected, matrix, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_zero_matrix_gives_finite_orthonormal_vectors(method):
    vectors_DR, values_R = right_subspace(jnp.zeros((50, 30)), 5, method, KEY)
    assert np.allclose(vectors_DR.T @ vectors_DR, np.eye(5), atol=1e-6)
    assert np.all(values_R == 0)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_comes_in_and_float32_goes_out(method):
    matrix = jnp.asarray(with_spectrum(90, 40, 0.5 ** np.arange(40))).astype(jnp.bfloat16)
    from_bfloat16 = right_subspace(matrix, 6, method, KEY)
    from_float32 = right_subspace(matrix.astype(jnp.float32), 6, method, KEY)
    for ours, same in zip(from_bfloat16, from_float32, strict=True):
        assert ours.dtype == jnp.float32
        assert np.array_equal(ours, same)


def test_full_rank_sketch_is_exact():
    matrix = jnp.asarray(with_spectrum(90, 40, 0.9 ** np.arange(40)))
    _, exact = right_subspace(matrix, 40, "exact", KEY)
    _, randomized = right_subspace(matrix, 40, "randomized", KEY)
    assert np.allclose(exact, randomized, atol=1e-5)


@pytest.mark.parametrize(("rank", "method"), [(0, "exact"), (31, "randomized"), (5, "svd")])
def test_bad_rank_and_method_name_what_came(rank, method):
    with pytest.raises(UserError, match=str(rank) if method in METHODS else method):
        right_subspace(jnp.zeros((50, 30)), rank, method, KEY)


def test_polar_is_numpys_and_the_nearest_orthonormal_matrix():
    rng = np.random.default_rng(5)
    matrix = rng.normal(size=(6, 25)) + 2 * rng.normal(size=25)  # nearly parallel rows, as mean gate rows are
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    ours = np.asarray(polar(jnp.asarray(matrix, jnp.float32)))
    assert np.allclose(ours, left @ right, atol=1e-5)
    assert np.allclose(ours @ ours.T, np.eye(6), atol=1e-5)
    nearest = np.linalg.norm(matrix - ours)
    for spread in (1e-2, 0.1, 1.0, 100.0):
        for _ in range(20):
            other = np.linalg.qr((ours + spread * rng.normal(size=ours.shape)).T)[0].T
            other *= np.sign(np.sum(other * ours, axis=1, keepdims=True))
            assert np.linalg.norm(matrix - other) > nearest


@pytest.mark.parametrize("rows", [[0, 1, 1, 2], [0, 3, 1, 2]], ids=["equal rows", "zero row"])
def test_polar_of_dependent_rows_is_still_orthonormal(rows):
    matrix = jax.random.normal(KEY, (4, 11)).at[3].set(0)[jnp.array(rows)]
    ours = polar(matrix)
    assert np.allclose(ours @ ours.T, np.eye(4), atol=1e-5)


def test_polar_of_more_rows_than_columns_is_refused():
    with pytest.raises(UserError, match="at most 4 rows of length 4, got 5"):
        polar(jnp.ones((5, 4)))
