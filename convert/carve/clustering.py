"""Cuts the neurons of a dense FFN into equal groups that fire together: balanced spherical k-means of their gate rows.

Every round assigns the neurons to centroids under equal group sizes, then moves each centroid to the mean direction of
its group. The assignment is a transport problem whose dual has one price per group: with the right prices π, each
neuron simply takes argmin_e(cost_e + π_e). It is solved to the optimum in two steps:

1. Prices. Replace the argmin by a softmin at a temperature; the prices that level the expected loads are the root of
   E smooth equations. Follow that root with Newton steps while the temperature falls.
2. Leftovers. Whatever the prices, taking the argmin is optimal *for the group sizes that come out*. The few neurons by
   which these sizes are off travel along shortest paths in the graph of groups, where the edge a → b costs the
   cheapest move of a member of a to b; a shortest path keeps optimality. Costs are integers there, so that ties are
   ties: a path moves all its tied neurons at once, and duplicate or all-zero rows cost no more than others.

Letters: F neurons, E groups (experts), D embed, R features.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import Precision

from nemoe_jax.errors import UserError

NEWTON_STEPS = 34  # two per halving of the temperature: it ends at 2⁻¹⁶ of the costs' spread
UNREACHED = 2**29  # farther than any path (2²⁸ of costs, 2²⁷ of prices), and twice it still fits int32


def group_size(neurons: int, groups: int) -> int:
    """Neurons per group; raises UserError unless they divide evenly."""
    if groups < 1 or neurons % groups or not neurons:
        raise UserError(f"equal groups: {neurons} neurons do not divide into {groups} groups")
    return neurons // groups


def contiguous(neurons: int, groups: int) -> Array:
    """The partition that ignores the weights: (E, F/E) int32, group e holds the e-th run of neurons."""
    return jnp.arange(neurons, dtype=jnp.int32).reshape(groups, group_size(neurons, groups))


def neuron_features(gate_FD: Array, subspace_DR: Array) -> Array:
    """Each gate row, scaled to unit length, in the coordinates of a subspace: (F, R) float32.

    A feature's length is the cosine between row and subspace, so that neurons the subspace does not explain count for
    less in the clustering. A zero row gives a zero feature. Pass gate rows with the norm weight folded in.
    """
    unit_FD = _unit_rows(gate_FD.astype(jnp.float32))
    return jnp.einsum("FD,DR->FR", unit_FD, subspace_DR.astype(jnp.float32), precision=Precision.HIGHEST)


def neuron_weights(up_FD: Array, down_FD: Array) -> Array:
    """‖up row‖·‖down column‖ of each neuron (F,), the size of its output; blind to the sign that up and down share."""
    up_FD, down_FD = up_FD.astype(jnp.float32), down_FD.astype(jnp.float32)
    return jnp.linalg.norm(up_FD, axis=1) * jnp.linalg.norm(down_FD, axis=1)


def balanced_kmeans(
    features_FR: Array, groups: int, key: Array, weights: Array | None = None, *, iterations: int = 50
) -> Array:
    """Balanced spherical k-means: (E, F/E) int32 neuron indices, ascending within each group.

    It maximizes Σ_i weight_i · feature_i · centroid_{group of i} over unit centroids and equal groups, from k-means++
    seeds, until nothing changes or `iterations` rounds have passed. A row counts by its length times its weight (F,);
    unit rows and no weights are the textbook case. The same key gives the same partition.
    Raises UserError when the groups do not divide the neurons.
    """
    group_size(features_FR.shape[0], groups)
    features_FR = features_FR.astype(jnp.float32)
    if weights is not None:
        features_FR = features_FR * weights.astype(jnp.float32)[:, None]
    labels_F = _cluster(features_FR, groups, key, iterations)
    return jnp.argsort(labels_F, stable=True).astype(jnp.int32).reshape(groups, -1)


@jax.jit
def balanced_assignment(cost_FE: Array) -> Array:
    """The cheapest assignment of rows to columns with F/E rows in each column: labels (F,) int32.

    Optimal for the costs rounded to 2²⁴ steps between their least and greatest (fewer steps for more than 16 groups, so
    that path lengths fit int32). Costs that are not finite count as 0. Raises UserError when the columns do not divide
    the rows.
    """
    neurons, groups = cost_FE.shape
    capacity = group_size(neurons, groups)
    steps = min(2**24, 2**28 // groups)
    # NaN or infinity as an integer can make cycles of negative length, round which the search would never end
    cost_FE = jnp.where(jnp.isfinite(cost_FE), cost_FE, 0).astype(jnp.float32)
    cost_FE = cost_FE - cost_FE.min()
    cost_FE = cost_FE * (steps / jnp.maximum(cost_FE.max(), jnp.finfo(jnp.float32).tiny))
    prices_E = jnp.clip(_level_prices(cost_FE, capacity), -(2**26), 2**26)
    # priced costs have the same optimum, since a group's price is paid F/E times whoever its members are; and with
    # them the shortest paths through tied rows have length 0, so that ties, the bulk of a surplus, are settled first
    priced_EF = (jnp.round(cost_FE).astype(jnp.int32) + jnp.round(prices_E).astype(jnp.int32)).T
    return _settle(priced_EF, jnp.argmin(priced_EF, axis=0).astype(jnp.int32), capacity)


@partial(jax.jit, static_argnames="groups")
def _cluster(features_FR: Array, groups: int, key: Array, iterations: int | Array) -> Array:
    def unfinished(state):
        rounds, changed, *_ = state
        return changed & (rounds < iterations)

    def improve(state):
        rounds, _, labels_F, centroids_ER = state
        cost_FE = -jnp.einsum("FR,ER->FE", features_FR, centroids_ER, precision=Precision.HIGHEST)
        new_F = balanced_assignment(cost_FE)
        member_EF = jax.nn.one_hot(new_F, groups, axis=0)
        sums_ER = jnp.einsum("EF,FR->ER", member_EF, features_FR, precision=Precision.HIGHEST)
        return rounds + 1, jnp.any(new_F != labels_F), new_F, _unit_rows(sums_ER)

    nowhere_F = jnp.full(features_FR.shape[0], -1, jnp.int32)
    start = (jnp.int32(0), jnp.bool_(True), nowhere_F, _seeds(features_FR, groups, key))
    return jax.lax.while_loop(unfinished, improve, start)[2]


def _seeds(features_FR: Array, groups: int, key: Array) -> Array:
    """k-means++ (Arthur, Vassilvitskii 2007): each next centroid is a row drawn by its cost so far, ‖f‖ − max f·c."""
    length_F = jnp.linalg.norm(features_FR, axis=1)
    unit_FR = _unit_rows(features_FR)

    def draw(group, state):
        centroids_ER, cost_F = state
        row = jax.random.categorical(jax.random.fold_in(key, group), jnp.log(cost_F))
        centroid_R = unit_FR[row]
        similarity_F = jnp.einsum("FR,R->F", features_FR, centroid_R, precision=Precision.HIGHEST)
        cost_F = jnp.minimum(cost_F, jnp.maximum(length_F - similarity_F, 0))
        return centroids_ER.at[group].set(centroid_R), cost_F

    start = (jnp.zeros((groups, features_FR.shape[1]), jnp.float32), length_F)
    return jax.lax.fori_loop(0, groups, draw, start)[0]


def _level_prices(cost_FE: Array, capacity: int) -> Array:
    """Prices (E,) at which a softmin of falling temperature loads every group with about `capacity` rows."""
    groups = cost_FE.shape[1]
    spread = jnp.maximum(jnp.mean(cost_FE.max(1) - cost_FE.min(1)), 1)

    def newton(step, prices_E):
        temperature = spread * 0.5 ** (step // 2)
        share_FE = jax.nn.softmax(-(cost_FE + prices_E) / temperature, axis=1)
        load_E = share_FE.sum(0)
        slope_EE = jnp.diag(load_E) - jnp.einsum("Fe,FE->eE", share_FE, share_FE, precision=Precision.HIGHEST)
        # a common price changes nothing and an empty group has no slope: the ridge makes both solvable
        ridge = 1e-4 * jnp.trace(slope_EE) / groups + 1e-6 * capacity
        change_E = jnp.linalg.solve(slope_EE + ridge * jnp.eye(groups), load_E - capacity)
        # the slopes hold within a few temperatures
        return prices_E + temperature * jnp.clip(change_E - change_E.mean(), -2, 2)

    return jax.lax.fori_loop(0, NEWTON_STEPS, newton, jnp.zeros(groups, jnp.float32))


def _settle(cost_EF: Array, labels_F: Array, capacity: int) -> Array:
    """Moves the surplus of an assignment that is optimal for its own group sizes along shortest paths, in integers."""
    groups = cost_EF.shape[0]

    def cheapest_moves(labels_F, source):
        """The least extra cost of moving one member of a group to each group (E,)."""
        extra_EF = cost_EF - cost_EF[source]
        return jnp.where(labels_F == source, extra_EF, UNREACHED).min(1)

    def movable(labels_F, move_EE, source, target):
        return (labels_F == source) & (cost_EF[target] - cost_EF[source] == move_EE[source, target])

    def uneven(state):
        _, load_E, _ = state
        return jnp.any(load_E > capacity)

    def relieve(state):
        labels_F, load_E, move_EE = state
        distance_E, parent_E = _shortest_paths(move_EE, load_E > capacity)
        end = jnp.argmin(jnp.where(load_E < capacity, distance_E, 2 * UNREACHED))

        def tied(walk):
            group, amount = walk
            ties = jnp.sum(movable(labels_F, move_EE, parent_E[group], group))
            return parent_E[group], jnp.minimum(amount, ties)

        start, amount = jax.lax.while_loop(lambda walk: parent_E[walk[0]] >= 0, tied, (end, capacity - load_E[end]))
        amount = jnp.minimum(amount, load_E[start] - capacity)

        def shift(walk):  # from the end backwards: a group gives before it receives
            group, labels_F, new_EE = walk
            source = parent_E[group]
            chosen_F = movable(labels_F, move_EE, source, group)
            chosen_F &= jnp.cumsum(chosen_F) <= amount
            labels_F = jnp.where(chosen_F, group, labels_F)
            return source, labels_F, new_EE.at[group].set(cheapest_moves(labels_F, group))

        _, labels_F, new_EE = jax.lax.while_loop(lambda walk: parent_E[walk[0]] >= 0, shift, (end, labels_F, move_EE))
        new_EE = new_EE.at[start].set(cheapest_moves(labels_F, start))
        return labels_F, load_E.at[start].add(-amount).at[end].add(amount), new_EE

    load_E = jnp.bincount(labels_F, length=groups).astype(jnp.int32)
    move_EE = jax.lax.map(partial(cheapest_moves, labels_F), jnp.arange(groups))
    return jax.lax.while_loop(uneven, relieve, (labels_F, load_E, move_EE))[0]


def _shortest_paths(move_EE: Array, source_E: Array) -> tuple[Array, Array]:
    """Bellman-Ford from a set of groups: distances (E,) and the group before each on its path (E,), -1 at a start.

    Edges may be negative; an optimal assignment has no negative cycle.
    """

    def relax(state):
        distance_E, parent_E, _ = state
        through_EE = distance_E[:, None] + move_EE
        shorter_E = through_EE.min(0) < distance_E
        distance_E = jnp.where(shorter_E, through_EE.min(0), distance_E)
        return distance_E, jnp.where(shorter_E, through_EE.argmin(0).astype(jnp.int32), parent_E), jnp.any(shorter_E)

    groups = move_EE.shape[0]
    start = (jnp.where(source_E, 0, UNREACHED).astype(jnp.int32), jnp.full(groups, -1, jnp.int32), jnp.bool_(True))
    distance_E, parent_E, _ = jax.lax.while_loop(lambda state: state[2], relax, start)
    return distance_E, parent_E


def _unit_rows(matrix: Array) -> Array:
    """Rows scaled to unit length; zero rows stay zero."""
    norms = jnp.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / jnp.where(norms > 0, norms, 1)
