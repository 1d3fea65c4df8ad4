"""Causal attention on one device, by the best kernel that its platform has.

- TPU: splash attention, JAX's own Pallas kernel, which keeps no scores and shares keys and values between the heads of
  a group; where head_dim and length are multiples of its 128 lanes.
- NVIDIA GPU: gpu.py, in bfloat16 and float16.
- Elsewhere, and there too otherwise: XLA's plain attention while the scores are small, then `flash_attention_xla`.
- On CPU not the plain attention but `blockwise_attention_cpu`, which leaves out most of what the causal mask hides.

The platform is that of the ambient mesh, so that a program for a TPU slice can be compiled on a host that has none.

B batch, T sequence, N heads, K kv heads, H head_dim.
"""

import jax
import jax.numpy as jnp

from nemoe_jax.kernels.attention.cpu import blockwise_attention_cpu
from nemoe_jax.kernels.attention.gpu import gpu_attention
from nemoe_jax.kernels.attention.xla import flash_attention_xla
from nemoe_jax.kernels.backend import target_platform

LANES = 128  # of a TPU
LONG = 2048  # tokens above which the scores of all pairs are not kept


def causal_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None, window: int | None = None
) -> jax.Array:
    """Causal attention within segments, (B, T, N, H) in q's dtype; softmax in float32, scores scaled by H^-1/2.

    Args:
        window: how many tokens a token sees at most, itself included.
    """
    length, head_dim = q_BTNH.shape[1], q_BTNH.shape[3]
    if window is not None and window >= length:
        window = None
    if target_platform() == "tpu" and length % LANES == 0 and head_dim % LANES == 0:
        from nemoe_jax.kernels.attention.tpu import splash_attention  # Pallas takes half a second to import

        return splash_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, window)
    if target_platform() == "gpu" and q_BTNH.dtype in (jnp.bfloat16, jnp.float16):
        return gpu_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, window)
    if length > LONG:
        return flash_attention_xla(q_BTNH, k_BTKH, v_BTKH, segments_BT, window=window)
    if target_platform() == "cpu":
        return blockwise_attention_cpu(q_BTNH, k_BTKH, v_BTKH, segments_BT, window=window)
    mask = None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None])[:, None]
    seen = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask, is_causal=True, local_window_size=seen)
