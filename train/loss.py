"""Losses on logits, in float32 and in nats per token.

Letters: B batch, T sequence, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import Array


def cross_entropy(logits_BTV: Array, targets_BT: Array, mask_BT: Array | None = None) -> Array:
    """Mean of −log p(target) over the tokens where the mask is nonzero (over all without a mask)."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return _mean(jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT, mask_BT)


def forward_kl(student_BTV: Array, teacher_BTV: Array, mask_BT: Array | None = None) -> Array:
    """Mean of KL(teacher ‖ student) = Σ_v p_v (log p_v − log q_v), at temperature 1, over the masked tokens."""
    student_BTV = jax.nn.log_softmax(student_BTV.astype(jnp.float32))
    teacher_BTV = jax.nn.log_softmax(teacher_BTV.astype(jnp.float32))
    return _mean(jnp.sum(jnp.exp(teacher_BTV) * (teacher_BTV - student_BTV), axis=-1), mask_BT)


def _mean(values_BT: Array, mask_BT: Array | None) -> Array:
    if mask_BT is None:
        return values_BT.mean()
    mask_BT = mask_BT.astype(jnp.float32)
    # where, not a product alone: a masked position may hold an infinity
    return jnp.where(mask_BT > 0, values_BT * mask_BT, 0.0).sum() / jnp.maximum(mask_BT.sum(), 1.0)
