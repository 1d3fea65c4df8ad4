"""Experts that learn apart from the others of their layers, which stay frozen (ESFT, arXiv 2407.01906).

Their weights are taken out of the stacked arrays, so that the optimizer has averages of theirs alone; a step puts them
back into the frozen array, and the gradient of that takes out theirs.

L layers, E experts, S chosen ones.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nemoe_jax.spec.sharding import axes_of

Places = tuple[tuple[int, int], ...]  # layer, counted from the first MoE layer, and expert


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChosenExperts:
    """A weight of the chosen experts of all layers, (S, ...)."""

    values: Any
    places: Places = dataclasses.field(metadata={"static": True})

    def put_into(self, array_LE: jax.Array) -> jax.Array:
        """The stacked weight with theirs in it."""
        layers_S, experts_S = np.array(self.places).T
        return array_LE.at[layers_S, experts_S].set(self.values.astype(array_LE.dtype))


def take_experts(array_LE: jax.Array, places: Places) -> ChosenExperts:
    """The chosen experts' weights, copied in float32."""
    layers_S, experts_S = np.array(places).T
    take = jax.jit(lambda array: array[layers_S, experts_S].astype(jnp.float32), out_shardings=own_sharding(array_LE))
    return ChosenExperts(take(array_LE), places)


def own_sharding(array_LE: Any) -> Any:
    """Where the chosen ones of a stacked weight lie: cut as it is; what cuts layers or experts cuts another axis."""
    sharding = array_LE.sharding
    if not isinstance(sharding, NamedSharding):
        return sharding
    cuts: list[Any] = [*sharding.spec, *[None] * (len(array_LE.shape) - len(sharding.spec))]
    free, inner = (*axes_of(cuts[0]), *axes_of(cuts[1])), cuts[2:]
    parts = math.prod(sharding.mesh.shape[name] for name in free)
    for at, size in enumerate(array_LE.shape[2:]):
        if free and inner[at] is None and size % parts == 0:
            inner[at], free = free, ()
    return NamedSharding(sharding.mesh, PartitionSpec(None, *inner))


def choose(share_LE: np.ndarray, cumulative: float) -> Places:
    """Of each layer the fewest experts whose shares sum up to `cumulative`, the largest first."""
    share_LE = share_LE / np.maximum(share_LE.sum(axis=-1, keepdims=True), np.finfo(float).tiny)
    order_LE = np.argsort(-share_LE, axis=-1, kind="stable")
    before_LE = np.cumsum(np.take_along_axis(share_LE, order_LE, -1), -1) - np.take_along_axis(share_LE, order_LE, -1)
    counts_L = np.maximum((before_LE < cumulative * (1 - 1e-9)).sum(-1), 1)
    return tuple(
        (layer, expert)
        for layer, (order_E, count) in enumerate(zip(order_LE.tolist(), counts_L.tolist(), strict=True))
        for expert in sorted(order_E[:count])
    )
