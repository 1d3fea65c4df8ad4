"""Causal attention on CPU: row by row of the batch, in steps along the queries, each over the keys up to its end.

Row by row the scores of a step stay in cache. The gradient computes the weights again from the saved logarithms of
their sums (Dao et al., 2022), which is cheaper than to keep them, and forms the gradients of keys and values
transposed: on CPU a product that is wide rather than tall is three times as fast.

B batch, T sequence, N heads, K kv heads, H head_dim, Q the queries of a step times the heads that share a key, S keys
that a step sees.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

_HIDDEN = -1e30  # finite, so that a row that sees nothing gives no NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def blockwise_attention_cpu(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    step: int = 128,
    window: int | None = None,
) -> jax.Array:
    """Causal attention within segments, (B, T, N, H) in q's dtype; softmax in float32, scores scaled by H^-1/2.

    Args:
        step: queries of a step; an eighth of the length where that is more.
        window: how many tokens a token sees at most, itself included; keys before them are not read.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, step, window)[0]


def _steps(length: int, window: int | None, step: int) -> Iterator[tuple[int, int, int]]:
    """(first key that a step sees, its first query, its end)."""
    step = max(-(-length // 8), step)
    for start in range(0, length, step):
        yield 0 if window is None else max(start - window + 1, 0), start, min(start + step, length)


def _cut(x_TNH: jax.Array, start: int, end: int, kv_heads: int) -> jax.Array:
    """The step's queries, (K, Q, H): those of all heads that share a key in one product."""
    x = x_TNH[start:end].reshape(end - start, kv_heads, -1, x_TNH.shape[-1])
    return x.transpose(1, 2, 0, 3).reshape(kv_heads, -1, x.shape[-1])


def _joined(x_KQH: jax.Array, queries: int) -> jax.Array:
    """The inverse of `_cut`."""
    kv_heads, _, width = x_KQH.shape
    return x_KQH.reshape(kv_heads, -1, queries, width).transpose(2, 0, 1, 3).reshape(queries, -1, width)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _scores(
    q_KQH: jax.Array, k_KSH: jax.Array, segments_T: jax.Array | None, span: tuple[int, int, int], window: int | None
) -> jax.Array:
    """Scores (K, Q, S), hidden ones very negative."""
    first, start, end = span
    behind = jnp.arange(start, end)[:, None] - jnp.arange(first, end)
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    if segments_T is not None:
        seen &= segments_T[start:end, None] == segments_T[first:end]
    scores = _product("kqh,ksh->kqs", q_KQH, k_KSH)
    of_heads = scores.reshape(scores.shape[0], -1, *seen.shape)
    return jnp.where(seen, of_heads, _HIDDEN).reshape(scores.shape)


def scaled(q: jax.Array) -> jax.Array:
    """Queries times H^-1/2: a pass over them is cheaper than one over the scores."""
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, step, window):
    def of_row(row):
        q_TNH, k_TKH, v_TKH, segments_T = row
        q_TNH, k_KTH, v_KTH = scaled(q_TNH), k_TKH.swapaxes(0, 1), v_TKH.swapaxes(0, 1)
        parts, log_sums = [], []
        for first, start, end in _steps(len(q_TNH), window, step):
            q = _cut(q_TNH, start, end, len(k_KTH))
            scores = _scores(q, k_KTH[:, first:end], segments_T, (first, start, end), window)
            largest = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - largest)
            total = weights.sum(-1, keepdims=True)
            part = _product("kqs,ksh->kqh", weights.astype(v_KTH.dtype), v_KTH[:, first:end]) / total
            parts.append(_joined(part.astype(q_TNH.dtype), end - start))
            log_sums.append(largest + jnp.log(total))
        return jnp.concatenate(parts), log_sums

    y_BTNH, log_sums = lax.map(of_row, (q_BTNH, k_BTKH, v_BTKH, segments_BT))
    return y_BTNH, (q_BTNH, k_BTKH, v_BTKH, segments_BT, y_BTNH, log_sums)


def _backward(step, window, residuals, dy_BTNH):
    def of_row(row):
        (q_TNH, k_TKH, v_TKH, segments_T, y_TNH, log_sums), dy_TNH = row
        q_TNH, k_KTH, v_KTH = scaled(q_TNH), k_TKH.swapaxes(0, 1), v_TKH.swapaxes(0, 1)
        own_TN1 = jnp.sum(dy_TNH.astype(jnp.float32) * y_TNH.astype(jnp.float32), axis=-1, keepdims=True)
        kv_heads, length, width = k_KTH.shape
        dq, dk_KHT, dv_KHT = [], jnp.zeros((kv_heads, width, length)), jnp.zeros((kv_heads, width, length))
        for span, log_sum in zip(_steps(length, window, step), log_sums, strict=True):
            first, start, end = span
            q, dy, own = (_cut(x, start, end, kv_heads) for x in (q_TNH, dy_TNH, own_TN1))
            k, v = k_KTH[:, first:end], v_KTH[:, first:end]
            weights = jnp.exp(_scores(q, k, segments_T, span, window) - log_sum)
            dscores = (weights * (_product("kqh,ksh->kqs", dy, v) - own)).astype(q.dtype)
            dq.append(_joined(_product("kqs,ksh->kqh", dscores, k), end - start))
            after = ((0, 0), (0, 0), (first, length - end))
            dk_KHT += jnp.pad(_product("kqh,kqs->khs", q, dscores), after)
            dv_KHT += jnp.pad(_product("kqh,kqs->khs", dy, weights.astype(v.dtype)), after)
        dk, dv = (dx.transpose(2, 0, 1).astype(k_TKH.dtype) for dx in (dk_KHT, dv_KHT))
        return scaled(jnp.concatenate(dq)).astype(q_TNH.dtype), dk, dv

    return *lax.map(of_row, (residuals, dy_BTNH)), None


blockwise_attention_cpu.defvjp(_forward, _backward)
