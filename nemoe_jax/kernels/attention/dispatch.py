"""Causal attention on one device, by the best kernel that its platform has.

- TPU: splash attention, JAX's own Pallas kernel, which keeps no scores and shares keys and values between the heads of
  a group; where head_dim and length are multiples of its 128 lanes.
- NVIDIA GPU: attention_gpu.py, in bfloat16 and float16.
- Elsewhere, and there too otherwise: XLA's plain attention while the scores are small, then `chunked_attention`.
- On CPU not the plain attention but `stepped_attention`, which leaves out most of what the causal mask hides.

The platform is that of the ambient mesh, so that a program for a TPU slice can be compiled on a host that has none.

B batch, T sequence, N heads, K kv heads, H head_dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from nemoe_jax.kernels.attention.cpu import scaled, stepped_attention
from nemoe_jax.kernels.attention.gpu import gpu_attention
from nemoe_jax.kernels.attention.xla import chunked_attention
from nemoe_jax.kernels.backend import platform

LONG = 2048  # tokens above which the scores of all pairs are not kept
_LANES = 128
_BLOCKS = (1024, 512, 256, 128)  # tokens of a splash block: the largest that divides the length


def causal_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None
) -> jax.Array:
    """Causal attention within segments, (B, T, N, H) in q's dtype; softmax in float32, scores scaled by H^-1/2."""
    length, head_dim = q_BTNH.shape[1], q_BTNH.shape[3]
    if platform() == "tpu" and length % _LANES == 0 and head_dim % _LANES == 0:
        return splash_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    if platform() == "gpu" and q_BTNH.dtype in (jnp.bfloat16, jnp.float16):
        return gpu_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    if length > LONG:
        return chunked_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    if platform() == "cpu":
        return stepped_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    mask = None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None])[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask, is_causal=True)


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
    of_rows = (x.swapaxes(1, 2) for x in (scaled(q_BTNH), k_BTKH, v_BTKH))
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
