"""Rotary position embedding (Su et al., 2021) and the ways in which its frequencies are stretched.

B batch, T sequence, N heads, H head_dim.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from nemoe_jax.spec.config import ModelConfig, RopeScaling

CosSin = tuple[jax.Array, jax.Array]


def rope_cos_sin(config: ModelConfig, positions_BT: jax.Array, counted_BT: jax.Array | None = None) -> CosSin:
    """Cosine and sine, float32 (B, T, H/2), of the angles position · frequency.

    Made once for all layers: on CPU XLA computes them anew for every head wherever they are fused with what they turn.

    Args:
        counted_BT: which positions count for the length of a sequence, by which dynamic scaling goes.
    """
    scaling = config.rope_scaling
    positions_BT1 = positions_BT[..., None].astype(jnp.float32)
    if scaling is not None and scaling.type == "dynamic":
        counted_BT = jnp.ones(positions_BT.shape, bool) if counted_BT is None else counted_BT
        length_B = jnp.max(jnp.where(counted_BT, positions_BT + 1, 0), axis=1)
        angles_BTH = positions_BT1 * _dynamic_frequencies(config, scaling, length_B)[:, None]
    else:
        angles_BTH = positions_BT1 * frequencies(config)
    factor = scaling.attention_factor if scaling is not None else 1.0
    cos, sin = jnp.cos(angles_BTH), jnp.sin(angles_BTH)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rope(x_BTNH: jax.Array, cos_sin: CosSin) -> jax.Array:
    """Rotates each head's halves, in Hugging Face's order."""
    cos, sin = (part_BTH[:, :, None] for part_BTH in cos_sin)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


def frequencies(config: ModelConfig) -> jax.Array:
    """Angle per position of each pair of a head's dimensions, float32 (H/2,): theta^(-2i/H), scaled."""
    half = config.head_dim // 2
    plain_H = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is None or scaling.type == "dynamic":
        return plain_H
    if scaling.type == "linear":
        return plain_H / scaling.factor
    slowed_H = plain_H / scaling.factor
    kept_H = _kept_by_llama3(config, scaling) if scaling.type == "llama3" else _kept_by_yarn(config, scaling)
    return slowed_H + (plain_H - slowed_H) * kept_H.astype(np.float32)


def _kept_by_llama3(config: ModelConfig, scaling: RopeScaling) -> np.ndarray:
    """How much of each frequency stays: all where the original context holds many turns, none where it holds few."""
    half = config.head_dim // 2
    turns_H = scaling.original_context / (2 * math.pi) * config.rope_theta ** (-np.arange(half) / half)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((turns_H - low) / (high - low), 0, 1)


def _kept_by_yarn(config: ModelConfig, scaling: RopeScaling) -> np.ndarray:
    """The same along a ramp between the pairs that turn `beta_fast` and `beta_slow` times in the original context."""
    half = config.head_dim // 2

    def pair_with(turns: float) -> float:
        return half * math.log(scaling.original_context / (turns * 2 * math.pi)) / math.log(config.rope_theta)

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    ramp_H = (np.arange(half) - first) / (last - first or 0.001)
    return 1 - np.clip(ramp_H, 0, 1)


def _dynamic_frequencies(config: ModelConfig, scaling: RopeScaling, length_B: jax.Array) -> jax.Array:
    """Frequencies for sequences of those lengths, float32 (B, H/2): the base grows beyond the context."""
    half = config.head_dim // 2
    length_B1 = jnp.maximum(length_B, config.context)[:, None].astype(jnp.float32)
    stretch_B1 = scaling.factor * length_B1 / config.context - (scaling.factor - 1)
    base_B1 = config.rope_theta * stretch_B1 ** (half / (half - 1))
    return base_B1 ** (-jnp.arange(half, dtype=jnp.float32) / half)
