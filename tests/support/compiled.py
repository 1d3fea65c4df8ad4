"""What tests call again and again as one program for each config and shape.

Outside of `jax.jit` every operation is compiled on its own, and so is every shape of random values.
"""

import math

import jax
import numpy as np

from nemoe_jax.adapters import lora
from nemoe_jax.model import transformer
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.first_values import first_values

forward = jax.jit(transformer.forward, static_argnums=0, static_argnames="remat")
merge = jax.jit(lora.merge, static_argnums=0)


def normal(key: jax.Array, shape: tuple[int, ...], std: float = 1.0) -> jax.Array:
    """`std * jax.random.normal(key, shape)`, of few programs."""
    return first_values(key, shape, std, np.float32, None)


def random_tokens(key: jax.Array, shape: tuple[int, ...], vocab: int) -> jax.Array:
    """`jax.random.randint(key, shape, 0, vocab)`, of one program for all shapes of up to 512 tokens."""
    size = math.prod(shape)
    tokens = np.asarray(jax.random.randint(key, (max(size, 512),), 0, vocab))
    return jax.device_put(tokens[:size].reshape(shape))


def random_adapters(config: ModelConfig, targets: list[lora.Target], size: float = 0.2, seed: int = 0):
    """Adapters as if trained: B is not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jax.device_put(np.asarray(size * rng.standard_normal(x.shape), x.dtype)),
        lora.abstract(config, targets),
    )
