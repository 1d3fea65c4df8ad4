"""Random first values of arrays, each made where it will live.

Element i of `jax.random.normal` depends on the key and i alone, whatever the length: small arrays are
beginnings of arrays of a few lengths, so that a small model compiles three programs and not one for each shape.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LENGTHS = (2**9, 2**12, 2**15)


def first_values(
    key: jax.Array, shape: tuple[int, ...], std: float | None, dtype: Any, place: jax.sharding.Sharding | None
) -> jax.Array:
    """Normal values with a standard deviation, or ones where it is None; the same on every mesh."""
    size = math.prod(shape)
    if size > LENGTHS[-1] or isinstance(key, jax.core.Tracer):
        return _make(shape, std is None, jnp.dtype(dtype), place)(key, std)
    if std:
        length = next(length for length in LENGTHS if length >= size)
        values = np.asarray(_normal(length)(key, std))[:size]
    else:
        values = np.full(size, std is None, np.float32)
    array = values.astype(dtype).reshape(shape)
    return jax.device_put(array) if place is None else jax.make_array_from_callback(shape, place, array.__getitem__)


@functools.lru_cache(maxsize=256)  # one compilation for the arrays of one shape
def _make(shape: tuple[int, ...], ones: bool, dtype: Any, place: jax.sharding.Sharding | None) -> Any:
    """A compiled function from a key and a standard deviation to an array."""

    def make(key: jax.Array, std: Any) -> jax.Array:
        if ones:
            return jnp.ones(shape, dtype)
        values = jax.random.normal(key, (math.prod(shape),), jnp.float32)  # flat: compiles several times faster
        return (jnp.float32(std) * values).astype(dtype).reshape(shape)

    return jax.jit(make, out_shardings=place)


@functools.cache
def _normal(length: int) -> Any:
    return jax.jit(lambda key, std: jnp.float32(std) * jax.random.normal(key, (length,), jnp.float32))
