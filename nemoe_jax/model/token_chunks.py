"""Work on many tokens part by part: what a part holds is freed before the next, and made again for the gradient."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nemoe_jax.model.layers import Adapters


def num_chunks(size: int, at_most: int) -> int:
    """In how many equal parts `size` things are worked on: of `at_most` each, where that (nearly) divides them."""
    fewest = -(-size // at_most)
    return next((parts for parts in range(fewest, 2 * fewest) if size % parts == 0), 1)


def map_token_chunks(
    run: Callable[[Any, Adapters], jax.Array], arrays: Any, adapters: Adapters, parts: int
) -> jax.Array:
    """`run(arrays, adapters)` for arrays cut into equal parts along their first axis; the results, one after another.

    Each part drops other elements of the adapters' inputs.
    """
    if parts == 1:
        return run(arrays, adapters)
    # gradients of the adapters are summed over the parts: in float32
    adapters = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, adapters
    )

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run_part(part: Any, number: jax.Array) -> jax.Array:
        return run(part, _keyed(adapters, number))

    cut = jax.tree.map(lambda array: array.reshape(parts, -1, *array.shape[1:]), arrays)
    results = lax.scan(lambda _, xs: (None, run_part(*xs)), None, (cut, jnp.arange(parts)))[1]
    return results.reshape(-1, *results.shape[2:])


def _keyed(adapters: Adapters, number: jax.Array) -> Adapters:
    """The adapters with dropout masks that differ between the parts."""

    def fold_in(leaf: jax.Array) -> jax.Array:
        return jax.random.fold_in(leaf, number) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return jax.tree.map(fold_in, adapters)
