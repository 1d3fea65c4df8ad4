"""Causal attention on one device, by the best kernel that its platform has.

- TPU: splash attention, JAX's own Pallas kernel, which keeps no scores and shares keys and values between the heads of
  a group; where head_dim and length are multiples of its 128 lanes.
- Elsewhere, and there too otherwise: XLA's plain attention while the scores are small, then `chunked_attention`.
- On CPU not the plain attention but `stepped_attention`, which leaves out most of what the causal mask hides.

The platform is that of the ambient mesh, so that a program for a TPU slice can be compiled on a host that has none.

B batch, T sequence, N heads, K kv heads, H head_dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from nemoe_jax.chunked_attention import chunked_attention

LONG = 2048  # tokens above which the scores of all pairs are not kept
_LANES = 128
_BLOCKS = (1024, 512, 256, 128)  # tokens of a splash block: the largest that divides the length


def causal_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None
) -> jax.Array:
    """Causal attention within segments, (B, T, N, H) in q's dtype; softmax in float32, scores scaled by H^-1/2."""
    length, head_dim = q_BTNH.shape[1], q_BTNH.shape[3]
    if _platform() == "tpu" and length % _LANES == 0 and head_dim % _LANES == 0:
        return splash_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    if length > LONG:
        return chunked_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    if _platform() == "cpu":
        return stepped_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    mask = None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None])[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask, is_causal=True)


def stepped_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None, step: int = 0
) -> jax.Array:
    """`causal_attention` in steps along the queries, each over the keys up to its end; a group's heads share products.

    Args:
        step: queries of a step; by default an eighth of the length, and 128 at least.
    """
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    step = step or max(-(-length // 8), 128)
    q_BTNH = _scaled(q_BTNH)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    tokens = jnp.arange(length)
    steps = []
    for start in range(0, length, step):
        end = min(start + step, length)
        q = q_BTNH[:, start:end].reshape(batch, end - start, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
        flat = q.reshape(batch, kv_heads, -1, width)  # one large product for all heads that share keys
        scores = jnp.einsum("bkqh,bksh->bkqs", flat, k_BKTH[:, :, :end], preferred_element_type=jnp.float32)
        seen = tokens[start:end, None] >= tokens[:end]
        if segments_BT is not None:
            seen = (seen & (segments_BT[:, start:end, None] == segments_BT[:, None, :end]))[:, None, None]
        scores = jnp.where(seen, scores.reshape(*q.shape[:-1], end), -jnp.inf)
        largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - largest).reshape(*flat.shape[:-1], end)
        part = jnp.einsum("bkqs,bksh->bkqh", weights.astype(v_BKTH.dtype), v_BKTH[:, :, :end])
        part = (part / weights.sum(-1, keepdims=True)).astype(q.dtype)
        steps.append(part.reshape(q.shape).transpose(0, 3, 1, 2, 4).reshape(batch, end - start, heads, width))
    return jnp.concatenate(steps, axis=1)


def splash_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None, interpret: bool = False
) -> jax.Array:
    """`causal_attention` by the Pallas kernel; `interpret` runs it on any platform, slowly."""
    length, heads = q_BTNH.shape[1:3]
    block = next(size for size in _BLOCKS if length % size == 0)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([CornerMask((length, length))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        interpret=interpret,
    )
    of_rows = (x.swapaxes(1, 2) for x in (_scaled(q_BTNH), k_BTKH, v_BTKH))
    if segments_BT is None:
        y_BNTH = jax.vmap(kernel)(*of_rows)
    else:
        ids = splash_attention_kernel.SegmentIds(segments_BT, segments_BT)
        y_BNTH = jax.vmap(kernel)(*of_rows, ids)
    return y_BNTH.swapaxes(1, 2)


class CornerMask(splash_attention_mask.CausalMask):
    """The causal mask, of whose blocks only the corners are made.

    They tell the kernel's set-up whether a block is whole, empty or cut. All entries of the blocks of 131,072 tokens
    would take it minutes.
    """

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (np.array([part.start, part.stop - 1]) for part in index)
        return rows[:, None] >= columns


def _scaled(q_BTNH: jax.Array) -> jax.Array:
    """Queries times H^-1/2: a pass over them is cheaper than one over the scores."""
    return (q_BTNH.astype(jnp.float32) * q_BTNH.shape[-1] ** -0.5).astype(q_BTNH.dtype)


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
