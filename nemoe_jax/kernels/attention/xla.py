"""Causal attention whose memory does not grow with the square of the length, in plain JAX.

Queries and keys go in chunks; for each chunk of queries a running maximum and sum make the softmax over the chunks of
keys exact (Milakov and Gimelshein, 2018; Dao et al., 2022). Chunks of keys that lie after their queries are never
visited, so the work is about half of the full square. The gradient computes the probabilities again from the saved
logarithms of the sums.

B batch, T sequence, N heads, K kv heads, G = N / K heads that share one, H head_dim, c chunks, Q and S the tokens of a
chunk of queries and of keys.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 512  # tokens
_HIDDEN = -1e30  # finite, so that a row whose first chunks are all hidden gives no NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flash_attention_xla(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    chunk: int = CHUNK,
    window: int | None = None,
) -> jax.Array:
    """Causal attention within segments, (B, T, N, H) in q's dtype; softmax in float32, scores scaled by H^-1/2.

    Args:
        window: how many tokens a token sees at most, itself included; chunks before them are not visited.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, chunk, window)[0]


def _cut(x_BTNH: jax.Array, heads: int, chunk: int) -> jax.Array:
    """(B, T, N, H) -> (c, B, K, G, Q, H), filled up with zeros; without the axis G where N is K."""
    batch, length, number, width = x_BTNH.shape
    x = jnp.pad(x_BTNH, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, chunk, heads, number // heads, width)
    return x.transpose(1, 0, 3, 4, 2, 5)


def _joined(x_cBKGQH: jax.Array, length: int) -> jax.Array:
    """The inverse of `_cut`."""
    chunks, batch, heads, group, chunk, width = x_cBKGQH.shape
    x = x_cBKGQH.transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, chunks * chunk, heads * group, width)[:, :length]


def _cut_segments(segments_BT: jax.Array | None, chunk: int) -> jax.Array | None:
    if segments_BT is None:
        return None
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, -segments_BT.shape[1] % chunk)), constant_values=-1)
    return segments_BT.reshape(segments_BT.shape[0], -1, chunk).swapaxes(0, 1)


def _scores(
    q_BKGQH: jax.Array, k_BKSH: jax.Array, i: Any, j: Any, segments_cBQ: jax.Array | None, window: int | None
) -> jax.Array:
    """Scaled scores of the chunk i of queries on the chunk j of keys, hidden ones very negative; (B, K, G, Q, S)."""
    scores = jnp.einsum("bkgqh,bksh->bkgqs", q_BKGQH, k_BKSH, preferred_element_type=jnp.float32)
    tokens = jnp.arange(k_BKSH.shape[2])
    behind = (i - j) * len(tokens) + tokens[:, None] - tokens  # how far each key is behind each query
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    if segments_cBQ is not None:
        own = segments_cBQ[i][:, :, None] == segments_cBQ[j][:, None]
        seen = (seen & own)[:, None, None]
    return jnp.where(seen, scores * q_BKGQH.shape[-1] ** -0.5, _HIDDEN)


def _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, chunk, window):
    heads, length = k_BTKH.shape[2], q_BTNH.shape[1]
    q = _cut(q_BTNH, heads, chunk)
    k, v = (_cut(x, heads, chunk)[:, :, :, 0] for x in (k_BTKH, v_BTKH))
    segments = _cut_segments(segments_BT, chunk)

    def of_queries(i):
        def visit(j, carry):
            sofar, largest, total = carry
            scores = _scores(q[i], k[j], i, j, segments, window)
            larger = jnp.maximum(largest, scores.max(-1))
            shrink, weights = jnp.exp(largest - larger), jnp.exp(scores - larger[..., None])
            part = jnp.einsum("bkgqs,bksh->bkgqh", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
            return sofar * shrink[..., None] + part, larger, total * shrink + weights.sum(-1)

        rows = q.shape[1:-1]
        start = (jnp.zeros(q.shape[1:], jnp.float32), jnp.full(rows, _HIDDEN), jnp.zeros(rows, jnp.float32))
        first = 0 if window is None else jnp.maximum(i * chunk - window + 1, 0) // chunk
        sofar, largest, total = lax.fori_loop(first, i + 1, visit, start)
        return (sofar / total[..., None]).astype(q.dtype), largest + jnp.log(total)

    y, log_sums = lax.map(of_queries, jnp.arange(q.shape[0]))
    y_BTNH = _joined(y, length)
    return y_BTNH, (q_BTNH, k_BTKH, v_BTKH, segments_BT, y_BTNH, log_sums)


def _backward(chunk, window, residuals, dy_BTNH):
    q_BTNH, k_BTKH, v_BTKH, segments_BT, y_BTNH, log_sums = residuals
    heads, length = k_BTKH.shape[2], q_BTNH.shape[1]
    q, dy, y = (_cut(x, heads, chunk) for x in (q_BTNH, dy_BTNH, y_BTNH))
    k, v = (_cut(x, heads, chunk)[:, :, :, 0] for x in (k_BTKH, v_BTKH))
    segments = _cut_segments(segments_BT, chunk)
    own = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)  # (c, B, K, G, Q)
    scale, chunks = q.shape[-1] ** -0.5, q.shape[0]

    def product(equation, *arrays):
        return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)

    def of_keys(dq, j):
        def visit(i, carry):
            dq, dk, dv = carry
            weights = jnp.exp(_scores(q[i], k[j], i, j, segments, window) - log_sums[i][..., None])
            dv += product("bkgqs,bkgqh->bksh", weights.astype(v.dtype), dy[i])
            dscores = weights * (product("bkgqh,bksh->bkgqs", dy[i], v[j]) - own[i][..., None]) * scale
            dscores = dscores.astype(q.dtype)
            dk += product("bkgqs,bkgqh->bksh", dscores, q[i])
            return dq.at[i].add(product("bkgqs,bksh->bkgqh", dscores, k[j])), dk, dv

        nothing = jnp.zeros(k.shape[1:], jnp.float32)
        last = chunks if window is None else jnp.minimum(((j + 1) * chunk + window - 2) // chunk + 1, chunks)
        dq, dk, dv = lax.fori_loop(j, last, visit, (dq, nothing, nothing))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = lax.scan(of_keys, jnp.zeros(q.shape, jnp.float32), jnp.arange(chunks))
    dk_BTKH, dv_BTKH = (_joined(x[:, :, :, None], length) for x in (dk, dv))
    return _joined(dq, length).astype(q_BTNH.dtype), dk_BTKH, dv_BTKH, None


flash_attention_xla.defvjp(_forward, _backward)
