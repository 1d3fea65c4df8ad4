"""Claim: a 12B layer's neurons are assigned to experts at the optimum (gap below 1e-6) in well under a second.

Prints, for 14336 neurons, 16 groups and features of rank 64: seconds of the randomized subspace, of the whole k-means
and of one balanced assignment; seconds of SciPy's HiGHS on the same transport problem, and the ratio; and the gap of
our assignment's cost to HiGHS's optimum, in float64. Costs are distances 1 − cos to centroids: to random ones, as in
the first round of k-means, and to those that k-means ends with.

    JAX_PLATFORMS=cpu python -m benchmarks.convert.clustering [--neurons 14336 --groups 16 --rank 64 --hidden 5120]
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linprog
from scipy.sparse import block_array, csr_array, eye_array, kron

from convert.carve.clustering import balanced_assignment, balanced_kmeans, neuron_features
from convert.carve.svd import right_subspace


def timed(function: Callable[[], jax.Array], repeats: int = 3) -> tuple[jax.Array, float]:
    """The result and the least seconds of several calls, the first of which (compilation) does not count."""
    result = jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def transport_optimum(cost_FE: np.ndarray) -> float:
    """The least cost of a balanced assignment, by HiGHS: one variable per pair, one equality per row and per column."""
    neurons, groups = cost_FE.shape
    each_neuron_once = kron(eye_array(neurons), csr_array(np.ones((1, groups))))
    groups_full = kron(csr_array(np.ones((1, neurons))), eye_array(groups))
    wanted = np.concatenate([np.ones(neurons), np.full(groups, neurons // groups)])
    constraints = block_array([[each_neuron_once], [groups_full]]).tocsr()
    # the fastest of HiGHS's ways here: its simplex, or its presolve, take up to 7 times as long
    options = {"presolve": False}
    solution = linprog(cost_FE.ravel(), A_eq=constraints, b_eq=wanted, method="highs-ipm", options=options)
    if not solution.success:
        raise RuntimeError(f"HiGHS: {solution.message}")
    return float(solution.fun)


def compare(name: str, features_FR: jax.Array, centroids_ER: jax.Array) -> None:
    cost_FE = 1 - jnp.matmul(features_FR, centroids_ER.T, precision=jax.lax.Precision.HIGHEST)
    labels_F, ours = timed(lambda: balanced_assignment(cost_FE))
    exact_FE = np.asarray(cost_FE, np.float64)
    start = time.perf_counter()
    optimum = transport_optimum(exact_FE)
    peer = time.perf_counter() - start
    cost = exact_FE[np.arange(len(exact_FE)), np.asarray(labels_F)].sum()
    gap = cost / optimum - 1
    print(f"{name:20s} ours {ours:.3f} s   HiGHS {peer:.1f} s   ratio {peer / ours:.0f}x   gap {gap:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=14336)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--rank", type=int, default=64, help="features per neuron")
    parser.add_argument("--hidden", type=int, default=5120, help="length of a gate row")
    options = parser.parse_args()
    matrix_key, key = jax.random.split(jax.random.key(0))

    decay_D = 1 / jnp.sqrt(1 + jnp.arange(options.hidden, dtype=jnp.float32))
    gate_FD = jax.random.normal(matrix_key, (options.neurons, options.hidden)) * decay_D
    subspace_DR, subspace_seconds = timed(lambda: right_subspace(gate_FD, options.rank, "randomized", key)[0])
    print(f"randomized subspace  {subspace_seconds:.2f} s of a {options.neurons} × {options.hidden} matrix")
    features_FR = neuron_features(gate_FD, subspace_DR)
    features_FR /= jnp.linalg.norm(features_FR, axis=1, keepdims=True)
    assignment_EF, kmeans_seconds = timed(lambda: balanced_kmeans(features_FR, options.groups, key), repeats=1)
    print(f"balanced k-means     {kmeans_seconds:.2f} s, at most 50 rounds")

    random_ER = jax.random.normal(key, (options.groups, options.rank))
    final_ER = features_FR[assignment_EF].sum(1)
    for name, centroids_ER in (("random centroids", random_ER), ("k-means centroids", final_ER)):
        compare(name, features_FR, centroids_ER / jnp.linalg.norm(centroids_ER, axis=1, keepdims=True))


if __name__ == "__main__":
    main()
