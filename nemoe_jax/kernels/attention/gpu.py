"""Causal attention of whole sequences on NVIDIA GPUs; no way keeps the scores. (Decoding: paged.py.)

- One document a row: cuDNN's flash attention, forward and gradient; it shares keys and values between the heads of a
  group.
- Packed documents: cuDNN takes them only as a mask of all pairs, so JAX's own Pallas kernel for Triton, with keys and
  values repeated.
- What none of them takes, float32 above all, and packed documents with a sliding window: `flash_attention_xla`.

B batch, T sequence, N heads, K kv heads, H head_dim.
"""

import importlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from nemoe_jax.kernels.attention.xla import flash_attention_xla

_WIDEST = 128  # head_dim that cuDNN takes on every card since Ampere
_BLOCK = 128  # queries and keys of a program of the Pallas kernel; half of it in the gradient


def gpu_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array | None, window: int | None = None
) -> jax.Array:
    """Causal attention within segments, (B, T, N, H) in q's dtype; softmax in float32, scores scaled by H^-1/2."""
    width = q_BTNH.shape[3]
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16) or width % 8 or not 16 <= width <= _WIDEST:
        return flash_attention_xla(q_BTNH, k_BTKH, v_BTKH, segments_BT, window=window)
    if segments_BT is None:
        seen = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, is_causal=True, local_window_size=seen, implementation="cudnn"
        )
    if window is not None:  # the kernel knows none
        return flash_attention_xla(q_BTNH, k_BTKH, v_BTKH, segments_BT, window=window)
    return packed_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def packed_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, interpret: bool = False
) -> jax.Array:
    """`gpu_attention` by the Pallas kernel; `interpret` runs it on any platform, slowly."""
    kernel = pallas_kernel("attention")
    length, group = q_BTNH.shape[1], q_BTNH.shape[2] // k_BTKH.shape[2]
    more = -length % _BLOCK
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH))
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, more)), constant_values=-1)
    half = _BLOCK // 2
    y = kernel.mha(
        q,
        k,
        v,
        segments_BT,
        sm_scale=q.shape[-1] ** -0.5,
        causal=True,
        block_sizes=kernel.BlockSizes(_BLOCK, _BLOCK, half, half, half, half),
        interpret=interpret,
    )
    return y[:, :length]


def pallas_kernel(name: str) -> Any:
    """JAX's module. Newer versions point to tokamax on import, which brings five packages that nothing else needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"jax.experimental.pallas.ops.gpu.{name}")
