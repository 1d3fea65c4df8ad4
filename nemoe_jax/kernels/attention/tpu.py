"""Attention on TPU: JAX's splash kernel."""

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from nemoe_jax.kernels.attention.cpu import scaled

_BLOCKS = (1024, 512, 256, 128)  # tokens of a splash block: the largest that divides the length


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`causal_attention` by the Pallas kernel; `interpret` runs it on any platform, slowly."""
    length, heads = q_BTNH.shape[1:3]
    block = next(size for size in _BLOCKS if length % size == 0)
    mask: splash_attention_mask.Mask = CornerMask((length, length))
    if window is not None:
        mask = splash_attention_mask.LocalMask((length, length), (window - 1, 0), 0)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
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
