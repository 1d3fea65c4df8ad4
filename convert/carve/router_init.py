"""Routers that need no data: one direction per expert, made orthonormal, times a small temperature.

Which space? The FFN and the router both read h = γ⊙x̂, the normalized activation times the norm weight. A gate row g
acts as g·h = (γ⊙g)·x̂, so two neurons fire together when their *folded* rows γ⊙g agree: that is the space to cluster
in. A router row r is applied to h like a gate row is. Its logit is an expert's mean gate pre-activation exactly when r
is the mean of the unfolded rows; a mean of folded rows would meet γ twice, (γ⊙g)·h = g·(γ²⊙x̂).

The polar factor of those means C gives R = τ·(C Cᵀ)^-½ C with R Rᵀ = τ²I as stored: no expert has a longer row, none
overlaps another, and each row stays as near as that allows to its expert's mean pre-activation. This is the default.
Passing `norm_D` to `polar_router` takes the polar factor in x̂-space instead and unfolds it, R = τ·polar(C diag γ)
diag(1/γ): logits are then uncorrelated for isotropic x̂ rather than isotropic h, but R Rᵀ is no longer τ²I and channels
with a tiny γ get huge weights. The two agree when γ is constant.

Letters: F neurons, E experts, D embed.
"""

import jax
import jax.numpy as jnp
from jax import Array

from convert.carve.svd import polar
from nemoe_jax.errors import UserError


@jax.jit
def expert_directions(gate_FD: Array, assignment_EF: Array, weights: Array | None = None) -> Array:
    """Mean gate row of each expert, scaled to unit length: (E, D) float32.

    Pass gate rows as stored, without the norm weight (see above). `weights` (F,) weighs the neurons: for example
    1/‖γ⊙g‖ counts every neuron's firing direction once, whatever its length. A zero mean stays zero.
    """
    gate_FD = gate_FD.astype(jnp.float32)
    if weights is not None:
        gate_FD = gate_FD * weights.astype(jnp.float32)[:, None]
    sums_ED = jax.lax.map(lambda members: gate_FD[members].sum(0), assignment_EF)
    length_E = jnp.linalg.norm(sums_ED, axis=1, keepdims=True)
    return sums_ED / jnp.where(length_E > 0, length_E, 1)


def polar_router(directions_ED: Array, temperature: float | Array, norm_D: Array | None = None) -> Array:
    """temperature · the nearest matrix with orthonormal rows: (E, D) float32, R Rᵀ = temperature²·I.

    With `norm_D` (D,), orthonormal in x̂-space instead; channels where the norm weight is zero get zero.
    Raises UserError when there are more experts than channels.
    """
    if norm_D is None:
        return temperature * polar(directions_ED)
    norm_D = norm_D.astype(jnp.float32)
    inverse_D = jnp.where(norm_D != 0, 1 / jnp.where(norm_D != 0, norm_D, 1), 0)
    return temperature * polar(directions_ED.astype(jnp.float32) * norm_D) * inverse_D


def random_orthogonal_router(key: Array, experts: int, hidden: int, temperature: float | Array) -> Array:
    """temperature · a uniformly random matrix with orthonormal rows: (E, D) float32, the control for `polar_router`."""
    if experts > hidden:
        raise UserError(f"orthonormal rows: expected at most {hidden} rows of length {hidden}, got {experts}")
    return temperature * jax.random.orthogonal(key, experts, m=hidden, dtype=jnp.float32)


def default_temperature(norm_D: Array, logit_std: float = 0.02) -> Array:
    """The row length τ () float32 at which router logits deviate by about `logit_std`.

    For a unit row r and x̂ of unit mean square, r·(γ⊙x̂) deviates by rms(γ) when neither prefers channels of the other,
    so τ = logit_std / rms(γ). At 0.02 the softmax weights of the chosen top-k stay within a few per cent of 1/k, while
    the choice itself, which no positive factor changes, is the same. Raises UserError unless logit_std is positive.
    """
    if not logit_std > 0:
        raise UserError(f"router logit deviation: expected a positive number, got {logit_std}")
    rms = jnp.sqrt(jnp.mean(jnp.square(norm_D.astype(jnp.float32))))
    return logit_std / jnp.where(rms > 0, rms, 1)
