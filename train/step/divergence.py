"""How far a student's predictions are from a teacher's, over the vocabulary or over the teacher's likeliest tokens.

With p the teacher's and q the student's probabilities at a temperature T, each times T² (arXiv 1503.02531):

- forward        KL(p ‖ q)
- reverse        KL(q ‖ p), which prefers the teacher's likeliest tokens           (arXiv 2306.08543)
- skew-forward   KL(p ‖ αp + (1 − α)q)                                             (arXiv 2402.03898)
- skew-reverse   KL(q ‖ αq + (1 − α)p)

Of a teacher that was kept on disk there are the log-probabilities of its k likeliest tokens; all others are one more
token, of the probability that is left: a lower bound of the divergence, and the same where that is nothing.

Letters: V vocabulary, K tokens that are kept.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from train.recipe import Divergence

LEAST = 1e-9  # probability of all tokens that are not kept, at least: half precision may leave nothing


def divergence(
    kind: Divergence, student: Array, teacher: Array, temperature: Array | float = 1.0, skew: Array | float = 0.1
) -> Array:
    """Of each token, from logits (…, V): (…), in nats; float32."""
    log_q, log_p = (jax.nn.log_softmax(logits.astype(jnp.float32) / temperature) for logits in (student, teacher))
    return temperature**2 * _of_logs(kind, log_q, log_p, skew)


def top_k_divergence(
    kind: Divergence,
    student: Array,
    ids: Array,
    log_p: Array,
    temperature: Array | float = 1.0,
    skew: Array | float = 0.1,
) -> Array:
    """The same from the student's logits (…, V) and the teacher's likeliest tokens and their log-probabilities (…, K).

    Args:
        log_p: at that temperature.
    """
    student = student.astype(jnp.float32) / temperature
    log_p = log_p.astype(jnp.float32)
    everything = jax.nn.logsumexp(student, axis=-1, keepdims=True)
    log_q = jnp.take_along_axis(student, ids, axis=-1) - everything
    others = jnp.put_along_axis(student, ids, -jnp.inf, axis=-1, inplace=False)
    log_q_rest = jax.nn.logsumexp(others, axis=-1, keepdims=True) - everything
    log_p_rest = jnp.log(jnp.maximum(1 - jnp.exp(log_p).sum(-1, keepdims=True), LEAST))
    log_q, log_p = (jnp.concatenate(parts, axis=-1) for parts in ((log_q, log_q_rest), (log_p, log_p_rest)))
    return temperature**2 * _of_logs(kind, log_q, log_p, skew)


def feature_distance(kind: Literal["cosine", "l2"], student_LBTD: Array, teacher_LBTD: Array, mask_BT: Array) -> Array:
    """Of each token the mean over the layers, (B, T): 1 − cos, or the squared distance over the layer's mean square.

    The mean square is the teacher's over the tokens that count.
    """
    student, teacher = (array.astype(jnp.float32) for array in (student_LBTD, teacher_LBTD))
    least = jnp.finfo(jnp.float32).tiny
    if kind == "cosine":
        squares = (jnp.maximum(jnp.sum(array**2, axis=-1), least) for array in (student, teacher))
        norms = jnp.sqrt(next(squares)) * jnp.sqrt(next(squares))
        return jnp.mean(1 - jnp.sum(student * teacher, axis=-1) / norms, axis=0)
    counts_BT = (mask_BT > 0).astype(jnp.float32)
    square_L = jnp.tensordot(jnp.sum(teacher**2, axis=-1), counts_BT, 2) / jnp.maximum(counts_BT.sum(), 1)
    distance_LBT = jnp.sum((student - teacher) ** 2, axis=-1)
    return jnp.mean(distance_LBT / jnp.maximum(square_L, least)[:, None, None], axis=0)


def _of_logs(kind: Divergence, log_q: Array, log_p: Array, skew: Array | float) -> Array:
    own, other = (log_q, log_p) if kind.endswith("reverse") else (log_p, log_q)
    if kind.startswith("skew"):
        other = jnp.logaddexp(own + jnp.log(skew), other + jnp.log1p(-skew))
    return jnp.sum(jnp.exp(own) * (own - other), axis=-1)
