"""Router rows that a carve made alike, and that stay so while they learn and where experts are pruned.

A carve by token clusters makes groups of C experts that share a router row, so that a token chooses a group whole. Were
each row to learn by itself, the rows would drift apart and tokens would get parts of several groups, as they do where
a group loses a member. Where C is above half of the experts, two groups share some: rows are v, -v, and 0 for what both
have. So every row is one learned row times 1, -1 or 0.

L layers, X embed (or the rank of an adapter), E experts, C top-k.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nemoe_jax.spec.schema import Tree, map_with_path


@dataclasses.dataclass(frozen=True, eq=False)
class RouterTies:
    """Row e of a layer is sign[e] times row leader[e]."""

    leader_LE: np.ndarray
    sign_LE: np.ndarray

    def groups(self, layer: int) -> list[list[int]]:
        """The experts of each group; each alone in a layer without ties."""
        leader_E, sign_E = self.leader_LE[layer], self.sign_LE[layer]
        if (sign_E < 1).any():
            return [np.flatnonzero(sign_E >= 0).tolist(), np.flatnonzero(sign_E <= 0).tolist()]
        return [np.flatnonzero(leader_E == leader).tolist() for leader in np.unique(leader_E)]

    def copied(self, rows_LXE: Array) -> Array:
        """Every row from its leader's, so that rows that are alike are so to the last bit."""
        rows_LXE = jnp.take_along_axis(rows_LXE, self.leader_LE[:, None], axis=-1)
        return rows_LXE * self.sign_LE[:, None].astype(rows_LXE.dtype)

    def mean(self, rows_LXE: Array) -> Array:
        """The nearest rows that are tied: of a gradient, the direction in which all of a group may go."""
        alike_LEE = self.leader_LE[:, :, None] == self.leader_LE[:, None, :]
        weight_LEE = alike_LEE * self.sign_LE[:, :, None] * self.sign_LE[:, None, :]
        weight_LEE = weight_LEE / np.maximum(np.abs(weight_LEE).sum(1, keepdims=True), 1)
        return self.copied(jnp.matmul(rows_LXE, weight_LEE.astype("f4"), precision=jax.lax.Precision.HIGHEST))

    def tied(self, params: Tree) -> Tree:
        """A model whose rows may have parted in rounding, as where an adapter was merged."""

        def copy(path: str, array: Any) -> Any:
            return jax.jit(self.copied, out_shardings=array.sharding)(array) if path.endswith("/router") else array

        return map_with_path(copy, params)


def find_ties(router_LDE: np.ndarray, top_k: int) -> RouterTies | None:
    """The ties of all layers; None where no layer's rows are those of groups that tokens choose whole."""
    layers = [_ties_of_layer(router_DE.T, top_k) for router_DE in router_LDE]
    if not any(layers):
        return None
    apart = np.arange(router_LDE.shape[-1]), np.ones(router_LDE.shape[-1], int)
    leader, sign = zip(*(layer or apart for layer in layers), strict=True)
    return RouterTies(np.stack(leader), np.stack(sign))


def _ties_of_layer(rows_ED: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(leader, sign) of each expert; None of a router whose rows are no such groups."""
    experts = len(rows_ED)
    if not 1 < top_k < experts:
        return None
    _, first, number_E, sizes = np.unique(rows_ED, axis=0, return_index=True, return_inverse=True, return_counts=True)
    if (sizes == top_k).all():
        return first[number_E.ravel()], np.ones(experts, int)
    leader = int(np.argmax(rows_ED.any(axis=1)))
    sign_E = (rows_ED == rows_ED[leader]).all(1).astype(int) - (rows_ED == -rows_ED[leader]).all(1)
    others, own = (sign_E < 0).sum(), (sign_E > 0).sum()
    zeros = (~rows_ED.any(axis=1)).sum()
    if own == others == experts - top_k and zeros == 2 * top_k - experts:
        return np.full(experts, leader), sign_E
    return None
