"""The teacher's weights, held once where the student has the same: a carved student shares attention, norms and
embeddings with the dense model that it was made from."""

from typing import Any

import jax
import jax.numpy as jnp

from nemoe_jax.spec.schema import Tree, leaves, unflatten
from train.step.step import Flat

GROUPS = ("blocks/dense/", "blocks/moe/")  # a dense layer's attention and norms are an MoE layer's in the student


def share_weights(teacher: Tree, frozen: Flat) -> tuple[Tree, int]:
    """(the teacher with the student's arrays in place of its own that are equal, bytes of those).

    Args:
        frozen: the student's weights that do not learn, by path.
    """
    shared, saved = dict[str, Any](), 0
    for path, array in leaves(teacher).items():
        names = [path, *(path.replace(GROUPS[0], group) for group in GROUPS if path.startswith(GROUPS[0]))]
        own = next((frozen[name] for name in names if name in frozen and _same(array, frozen[name])), None)
        shared[path] = array if own is None else own
        saved += 0 if own is None else array.nbytes
    return unflatten(shared), saved


def _same(one: jax.Array, other: Any) -> bool:
    if not isinstance(other, jax.Array):  # in FP8
        return False
    alike = (one.shape, one.dtype, one.sharding) == (other.shape, other.dtype, other.sharding)
    return alike and bool(_equal(one, other))


@jax.jit
def _equal(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.array_equal(one, other)
