"""The singular value decompositions that carving needs: the leading right-singular subspace of a tall matrix, and the
polar factor of a short wide one.

The subspace comes in three ways. "exact" is `jnp.linalg.svd` of the whole matrix, the oracle, minutes for a 5120 ×
14336 layer on two CPU cores. "gram" takes the eigenvectors of MᵀM: one large product and a square problem of side D, at
the price of half the digits of small singular values. "randomized" (Halko, Martinsson, Tropp 2011, arXiv 0909.4061)
reads the matrix in six products with a sketch and takes `jnp.linalg.svd` of a square of side rank + oversampling: a
second for the same layer. With the rows sharded over devices, the product with the sketch is local and its transpose is
one all-reduce; only sketches move.

Letters: F rows (neurons), D columns (embed), R rank, S sketch width, E experts.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import Precision

from nemoe_jax.errors import UserError

METHODS = ("exact", "randomized", "gram")


def right_subspace(
    matrix_FD: Array, rank: int, method: str, key: Array, *, oversampling: int = 16, power_iterations: int = 2
) -> tuple[Array, Array]:
    """The `rank` leading right-singular vectors (D, R), as columns, and their singular values (R,), descending.

    Any floating dtype comes in, float32 goes out. `key` serves the random sketch alone. Where the matrix has fewer than
    `rank` non-zero singular values, the vectors beyond them are some orthonormal completion, with values at rounding
    level. Peak memory beside the matrix: "exact" about two copies of it, "randomized" two sketches of rank +
    oversampling columns, "gram" a few matrices of side D. Raises UserError for an unknown method and for a rank
    outside 1 … min(F, D).
    """
    if method not in METHODS:
        raise UserError(f"svd method: expected one of {', '.join(METHODS)}, got {method!r}")
    limit = min(matrix_FD.shape)
    if not 1 <= rank <= limit:
        raise UserError(f"svd rank: expected 1 to {limit} for a {tuple(matrix_FD.shape)} matrix, got {rank}")
    if method == "exact":
        return _exact(matrix_FD, rank)
    if method == "gram":
        return _from_gram(matrix_FD, rank)
    return _randomized(matrix_FD, rank, key, min(rank + oversampling, limit), power_iterations)


def polar(matrix_ED: Array) -> Array:
    """The matrix with orthonormal rows that is nearest in Frobenius norm: P Qᵀ from the SVD C = P S Qᵀ, float32.

    Where the rows are linearly dependent (a zero row, two equal rows) the nearest matrix is not unique; one of them
    comes out, its rows still orthonormal. Raises UserError when there are more rows than columns.
    """
    rows, columns = matrix_ED.shape
    if rows > columns:
        raise UserError(f"orthonormal rows: expected at most {columns} rows of length {columns}, got {rows}")
    left_EE, _, right_ED = jnp.linalg.svd(matrix_ED.astype(jnp.float32), full_matrices=False)
    return jnp.matmul(left_EE, right_ED, precision=Precision.HIGHEST)


@partial(jax.jit, static_argnames="rank")
def _exact(matrix_FD: Array, rank: int) -> tuple[Array, Array]:
    _, values, right = jnp.linalg.svd(matrix_FD.astype(jnp.float32), full_matrices=False)
    return right[:rank].T, values[:rank]


@partial(jax.jit, static_argnames="rank")
def _from_gram(matrix_FD: Array, rank: int) -> tuple[Array, Array]:
    matrix_FD = matrix_FD.astype(jnp.float32)
    _, right_DD = jnp.linalg.eigh(jnp.einsum("FD,FE->DE", matrix_FD, matrix_FD, precision=Precision.HIGHEST))
    right_DR = right_DD[:, ::-1][:, :rank]
    # lengths of the projections, not roots of the eigenvalues: those drown in rounding where they are small
    return right_DR, jnp.linalg.norm(jnp.einsum("FD,DR->FR", matrix_FD, right_DR, precision=Precision.HIGHEST), axis=0)


@partial(jax.jit, static_argnames=("rank", "sketch", "power_iterations"))
def _randomized(matrix_FD: Array, rank: int, key: Array, sketch: int, power_iterations: int) -> tuple[Array, Array]:
    """Alternates orthonormal bases of the row and the column space, then solves the small problem between the two.

    The last half step M ᵀQ_F = Q_D T leaves M ≈ Q_F Tᵀ Q_Dᵀ with T a square of side S, so an SVD of Tᵀ ends it.
    """
    matrix_FD = matrix_FD.astype(jnp.float32)

    # QR after every product: without it the trailing directions of a decaying spectrum drown in float32 rounding
    def sweep(_, state):
        basis_DS, _ = state
        basis_FS, _ = jnp.linalg.qr(jnp.einsum("FD,DS->FS", matrix_FD, basis_DS, precision=Precision.HIGHEST))
        return tuple(jnp.linalg.qr(jnp.einsum("FD,FS->DS", matrix_FD, basis_FS, precision=Precision.HIGHEST)))

    basis_DS = jax.random.normal(key, (matrix_FD.shape[1], sketch), jnp.float32)
    start = (basis_DS, jnp.zeros((sketch, sketch), jnp.float32))
    # a loop, although it is short: each QR that is written out takes a TPU's compiler ten seconds
    basis_DS, triangle_SS = jax.lax.fori_loop(0, power_iterations + 1, sweep, start)
    _, values, right_SS = jnp.linalg.svd(triangle_SS.T)
    return jnp.einsum("DS,RS->DR", basis_DS, right_SS[:rank], precision=Precision.HIGHEST), values[:rank]
