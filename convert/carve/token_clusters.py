"""A calibrated carve whose experts are chosen in groups: one group of top-k experts for each cluster of tokens.

The most active neurons matter to nearly every token. A partition scatters them over all experts, so that no top-k
experts hold as many of them as a static choice does. Here a neuron may be in several experts. There are C = E/k groups
of k experts, and a group holds as many neurons as a token may use: those that are most active on its cluster of tokens.
The experts of a group have the same router row, hence they are chosen together and each weighs exactly 1/k; the model
is no larger than the dense one. With a single cluster this would be the static control, so a group starts where the
control is and differs from it as far as the tokens of its cluster do.

1. Clusters. Lloyd's algorithm on each neuron's share of the output's energy: a group takes the neurons with the largest
   shares on its tokens, a token goes to the group that holds most of its output.
2. Fit. Each group's `down` by ridge regression towards the dense stream after the layer, on the cluster's tokens and,
   with a small weight, all others. Tokens count by `calibration.token_weights`.
3. Router. Its rows minimize the expected error Σ_c p_c·error_c under p = softmax(logits), with a load-balancing term.
   Its choices are the new clusters; 2 and 3 alternate, and the last fit is on the last router's choices.
4. With refit steps, gate, up and `down` follow the gradient of that error (gradient_refit.py).

The groups may hold more neurons together than the dense FFN has (`--overlap`): more groups of the same size, for more
kinds of tokens, at the same cost of a token.

Where a token uses more than half of the experts, there are two groups that share 2k - E of them: the shared experts'
router rows are 0, the others' v and -v, so that every token chooses the shared ones and those of one sign.

A shared expert is likewise what all groups have in common: the most active neurons. Its gate is a constant, or fitted
last (shared_gate.py).

B batch, T sequence, N tokens, D embed, F neurons of the dense FFN, C clusters, S neurons of a group.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from convert.carve.calibration import LayerText, ridge_solve
from convert.carve.gradient_refit import group_output, refit_by_gradient
from convert.carve.shared_gate import fit_gate, gate_shares
from convert.layerwise import in_turn
from convert.streaming import Figures
from nemoe_jax.spec.schema import Tree

OTHERS = 0.1  # of a cluster's weight: all tokens, in the fit of its group
LLOYD_TOKENS, LLOYD_ROUNDS = 4096, 15
ROUTER_STEPS = 200, 100  # of each round, each on one batch
ROUTER_LOGIT_STEP = 1.0  # how far Adam's first step may move a logit; falls to 0 along a cosine
ROUTER_BALANCE = 0.05  # of the target's energy
CACHED_BYTES = 2**31  # of hidden activations; larger ones are computed anew in each pass

_ADAM = optax.scale_by_adam()
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Groups(NamedTuple):
    """What the experts of each group hold together, and the row that chooses it."""

    members_CS: np.ndarray  # the first `shared` are the same neurons with the same weights in every group
    router_CD: jax.Array
    ffn: Tree  # gate, up (C, D, S) and down (C, S, D), to be added up with weight 1
    shared: int = 0
    gated: int = 0  # how many of the shared ones are a shared expert's, to be times its gate
    gate_D: jax.Array | None = None


def carve_token_clusters(
    text: LayerText,
    clusters: int,
    neurons: int,
    ridge: float,
    logit_std: float,
    key: jax.Array,
    refit_steps: int = 0,
    shared: int = 0,
    gated: int = 0,
    gate: bool = False,
) -> Groups:
    """The groups of a layer.

    Args:
        neurons: of each group.
        ridge: how strongly `down` holds to the dense one; of the mean diagonal.
        logit_std: the router logits' standard deviation on this text, about each token's mean.
        key: of the first clusters and of the refit.
        refit_steps: by gradient, after the last ridge regression.
        shared: how many of a group's neurons all groups share.
        gated: how many of these are a shared expert's.
        gate: whether its gate is fitted; it is a constant otherwise.
    """
    hidden = _hidden(text)
    numbers = range(len(text.inputs))
    down_FD = text.ffn["down"]
    stride = -(-text.tokens // LLOYD_TOKENS)
    sample_NF = jnp.concatenate([_shares(hidden(number)[:, ::stride], down_FD) for number in numbers])
    mask_CF = _lloyd(jax.device_put(sample_NF.reshape(-1, len(down_FD)), jax.devices()[0]), clusters, neurons, key)
    mask_CF = np.asarray(mask_CF)
    labels = [_most_held(hidden(number), down_FD, mask_CF) for number in numbers]
    router_CD = jnp.zeros((clusters, text.inputs[0].shape[-1]))
    energy = text.energy
    for steps in ROUTER_STEPS:
        members_CS, down_CSD = _fit(text, hidden, labels, clusters, neurons, ridge, shared)
        costs = [
            _costs(hidden(number), text.wanted[number], text.weights[number], members_CS, down_CSD) / energy
            for number in numbers
        ]
        router_CD = _router(text.inputs, costs, router_CD, steps)
        labels = [_choices(x_BTD, router_CD) for x_BTD in text.inputs]
    members_CS, down_CSD = _fit(text, hidden, labels, clusters, neurons, ridge, shared)
    router_CD -= router_CD.mean(axis=0)  # what is common to all logits chooses nothing
    variance = sum(in_turn(_logit_variance(x_BTD, router_CD) for x_BTD in text.inputs)) / len(text.inputs)
    router_CD *= logit_std / jnp.sqrt(jnp.maximum(variance, jnp.finfo(jnp.float32).tiny))
    ffn = {name: jnp.moveaxis(text.ffn[name][:, members_CS], 1, 0) for name in ("gate", "up")} | {"down": down_CSD}
    labels = [np.asarray(label_BT) for label_BT in labels]
    if refit_steps:
        ffn = refit_by_gradient(text, labels, ffn, refit_steps, key, shared)
    gate_D = fit_gate(text, labels, ffn, gated) if gate else None
    return Groups(members_CS, router_CD, ffn, shared, gated, gate_D)


def measure_groups(text: LayerText, groups: Groups) -> Figures:
    """How a carved layer does on a text: error to the dense FFN and to the dense stream, load."""
    hidden = _hidden(text)
    sums = in_turn(
        _measures(
            hidden(number),
            x_BTD,
            text.wanted[number],
            text.weights[number],
            text.ffn["down"],
            groups.router_CD,
            groups.ffn,
            groups.gated,
            groups.gate_D,
        )
        for number, x_BTD in enumerate(text.inputs)
    )
    error, energy, chosen, best, load_C = (
        np.sum([np.asarray(part) for part in parts], axis=0) for parts in zip(*sums, strict=True)
    )
    wanted = text.energy * text.tokens
    clusters, neurons = groups.members_CS.shape
    shared, routed = groups.shared - groups.gated, neurons - groups.gated
    in_all = shared + clusters * (routed - shared)
    busiest = 1.0 if shared else load_C.max() / load_C.sum()
    return {
        "reconstruction_error": float(error / energy),
        "error_to_dense_stream": float(chosen / wanted),
        "error_to_dense_stream_best_choice": float(best / wanted),
        "load_max_over_mean": float(busiest / (routed / in_all)),
    }


def _hidden(text: LayerText) -> Callable[[int], jax.Array]:
    """The hidden activations of a batch by its number, kept where they are small."""
    if text.tokens * len(text.ffn["down"]) * 4 > CACHED_BYTES:
        return text.hidden
    return [text.hidden(number) for number in range(len(text.inputs))].__getitem__


def _fit(text, hidden, labels, clusters, neurons, ridge, shared=0):
    """Each group's neurons (C, S), the shared ones first, each part ascending, and their `down` (C, S, D)."""
    weights = [
        _cluster_weights(label_BT, weight_BT, clusters)
        for label_BT, weight_BT in zip(labels, text.weights, strict=True)
    ]
    squares_CF = sum(in_turn(_squares(hidden(number), weight) for number, weight in enumerate(weights)))
    activity_CF = np.asarray(squares_CF * jnp.sum(text.ffn["down"] ** 2, axis=1))
    members_CS = _members(activity_CF, neurons, shared)
    gram_CSS = np.zeros((clusters, neurons, neurons), np.float32)
    moment_CSD = np.zeros((clusters, neurons, text.ffn["down"].shape[1]), np.float32)
    sums = in_turn(
        _normal_sums(hidden(number), text.wanted[number], weight, members_CS) for number, weight in enumerate(weights)
    )
    for gram, moment in sums:
        gram_CSS += np.asarray(gram)
        moment_CSD += np.asarray(moment)
    dense_CSD = text.ffn["down"][members_CS]
    if shared:
        return members_CS, _solve_jointly(gram_CSS, moment_CSD, ridge, np.asarray(dense_CSD), shared)
    down_CSD = [ridge_solve(gram_CSS[group], moment_CSD[group], ridge, dense_CSD[group]) for group in range(clusters)]
    return members_CS, jnp.stack(down_CSD)


def _members(activity_CF: np.ndarray, neurons: int, shared: int) -> np.ndarray:
    """Each group's neurons (C, S): first those that all groups share, then the most active on its cluster."""
    clusters, in_all = activity_CF.shape
    own = neurons - shared
    if shared and clusters == 2 and shared + 2 * own == in_all:  # every neuron is in one: those that both want
        apart = np.argsort(activity_CF.min(axis=0), kind="stable")[: 2 * own]
        first = np.argsort(activity_CF[1, apart] - activity_CF[0, apart], kind="stable")
        common_S = np.setdiff1d(np.arange(in_all), apart)
        return np.stack([np.concatenate([common_S, np.sort(apart[part])]) for part in (first[:own], first[own:])])
    common_S = np.sort(np.argsort(-activity_CF.sum(axis=0), kind="stable")[:shared])
    others_CF = activity_CF.copy()
    others_CF[:, common_S] = -1
    own_CS = np.sort(np.argsort(-others_CF, axis=1, kind="stable")[:, :own], axis=1)
    return np.concatenate([np.tile(common_S, (clusters, 1)), own_CS], axis=1)


def _solve_jointly(
    gram_CSS: np.ndarray, moment_CSD: np.ndarray, ridge: float, dense_CSD: np.ndarray, shared: int
) -> jax.Array:
    """`down` of each group (C, S, D) where the first `shared` rows are the same in all."""
    clusters, neurons, width = moment_CSD.shape
    own = neurons - shared
    rows_CS = [np.r_[:shared, shared + group * own : shared + (group + 1) * own] for group in range(clusters)]
    in_all = shared + clusters * own
    gram = np.zeros((in_all, in_all), np.float32)
    moment, towards = np.zeros((2, in_all, width), np.float32)
    for group, rows_S in enumerate(rows_CS):
        gram[np.ix_(rows_S, rows_S)] += gram_CSS[group]
        moment[rows_S] += moment_CSD[group]
        towards[rows_S] = dense_CSD[group]
    return ridge_solve(gram, moment, ridge, towards)[np.stack(rows_CS)]


def _router(inputs: Sequence[jax.Array], costs: Sequence[jax.Array], router_CD: jax.Array, steps: int) -> jax.Array:
    """Rows (C, D) under which the softmax of the logits has the least expected cost, from those of the round before."""
    size = float(jnp.mean(jnp.sum(jnp.abs(inputs[0]), axis=-1)))
    state = _ADAM.init(router_CD)
    for step in range(steps):
        number = step % len(inputs)
        rate = ROUTER_LOGIT_STEP / size * 0.5 * (1 + math.cos(math.pi * step / steps))
        router_CD, state = _router_step(router_CD, state, inputs[number], costs[number], rate)
        jax.block_until_ready(router_CD)
    return router_CD


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _router_step(router_CD, state, x_BTD, cost_BTC, learning_rate):
    def loss(router_CD):
        share_BTC = jax.nn.softmax(_einsum("BTD,CD->BTC", x_BTD, router_CD))
        load_C = jnp.mean(share_BTC, axis=(0, 1))
        balance = len(load_C) * jnp.sum(load_C**2) - 1
        return jnp.mean(jnp.sum(share_BTC * cost_BTC, axis=-1)) + ROUTER_BALANCE * balance

    direction_CD, state = _ADAM.update(jax.grad(loss)(router_CD), state)
    return router_CD - learning_rate * direction_CD, state


@functools.partial(jax.jit, static_argnames=("clusters", "neurons"))
def _lloyd(shares_NF, clusters, neurons, key):
    """The neurons of each cluster as a mask (C, F).

    The first clusters are those of single tokens, each drawn by the share that the ones before it do not hold.
    """

    def draw(cluster, state):
        mask_CF, missed_N = state
        token = jax.random.categorical(jax.random.fold_in(key, cluster), jnp.log(jnp.maximum(missed_N, 0) + 1e-9))
        mask_F = _largest(shares_NF[token][None], neurons)[0]
        return mask_CF.at[cluster].set(mask_F), jnp.minimum(missed_N, 1 - shares_NF @ mask_F)

    def improve(_, mask_CF):
        label_N = jnp.argmax(_einsum("NF,CF->NC", shares_NF, mask_CF), axis=-1)
        # an empty cluster takes what is most active on all tokens
        sums_CF = _einsum("NC,NF->CF", jax.nn.one_hot(label_N, clusters), shares_NF) + 1e-6 * shares_NF.sum(0)
        return _largest(sums_CF, neurons)

    start = jnp.zeros((clusters, shares_NF.shape[1])), jnp.ones(len(shares_NF))
    mask_CF, _ = jax.lax.fori_loop(0, clusters, draw, start)
    return jax.lax.fori_loop(0, LLOYD_ROUNDS, improve, mask_CF)


def _largest(values_CF, neurons):
    _, index_CS = jax.lax.top_k(values_CF, neurons)
    return jax.nn.one_hot(index_CS, values_CF.shape[1]).sum(1)


@jax.jit
def _shares(hidden_BTF, down_FD):
    energy_BTF = hidden_BTF**2 * jnp.sum(down_FD**2, axis=1)
    return energy_BTF / jnp.maximum(energy_BTF.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


@jax.jit
def _most_held(hidden_BTF, down_FD, mask_CF):
    return jnp.argmax(_einsum("BTF,CF->BTC", hidden_BTF**2 * jnp.sum(down_FD**2, axis=1), mask_CF), axis=-1)


@functools.partial(jax.jit, static_argnames="clusters")
def _cluster_weights(label_BT, weight_BT, clusters):
    return (jax.nn.one_hot(label_BT, clusters) + OTHERS / clusters) * weight_BT[..., None]


@jax.jit
def _squares(hidden_BTF, weight_BTC):
    return _einsum("BTC,BTF->CF", weight_BTC, hidden_BTF**2)


@jax.jit
def _normal_sums(hidden_BTF, y_BTD, weight_BTC, members_CS):
    def of_group(group):
        members_S, weight_BT = group
        hidden_BTS = hidden_BTF[..., members_S]
        weighted_BTS = hidden_BTS * weight_BT[..., None]
        return _einsum("BTS,BTR->SR", weighted_BTS, hidden_BTS), _einsum("BTS,BTD->SD", weighted_BTS, y_BTD)

    return jax.lax.map(of_group, (members_CS, jnp.moveaxis(weight_BTC, -1, 0)))


@jax.jit
def _costs(hidden_BTF, y_BTD, weight_BT, members_CS, down_CSD):
    """The weighted squared error of each group on each token, (B, T, C)."""

    def of_group(group):
        members_S, down_SD = group
        return jnp.sum((_einsum("BTS,SD->BTD", hidden_BTF[..., members_S], down_SD) - y_BTD) ** 2, axis=-1)

    return jnp.moveaxis(jax.lax.map(of_group, (members_CS, down_CSD)), 0, -1) * weight_BT[..., None]


@jax.jit
def _choices(x_BTD, router_CD):
    return jnp.argmax(_einsum("BTD,CD->BTC", x_BTD, router_CD), axis=-1)


@jax.jit
def _logit_variance(x_BTD, router_CD):
    return jnp.mean(_einsum("BTD,CD->BTC", x_BTD, router_CD) ** 2)


@functools.partial(jax.jit, static_argnames="gated")
def _measures(hidden_BTF, x_BTD, y_BTD, weight_BT, dense_down_FD, router_CD, ffn, gated, gate_D):
    dense_BTD = _einsum("BTF,FD->BTD", hidden_BTF, dense_down_FD)
    chosen_BTC = jax.nn.one_hot(_choices(x_BTD, router_CD), len(router_CD))
    shares_BTS = 1.0 if gate_D is None else gate_shares(gate_D, x_BTD, gated, ffn["down"].shape[1])

    def errors(group):
        output_BTD = group_output(group, x_BTD, shares_BTS)
        return jnp.sum((output_BTD - dense_BTD) ** 2, axis=-1), jnp.sum((output_BTD - y_BTD) ** 2, axis=-1)

    error_BTC, cost_BTC = (jnp.moveaxis(array_CBT, 0, -1) for array_CBT in jax.lax.map(errors, ffn))
    cost_BTC *= weight_BT[..., None]
    return (
        jnp.sum(error_BTC * chosen_BTC),
        jnp.sum(dense_BTD**2),
        jnp.sum(cost_BTC * chosen_BTC),
        jnp.sum(cost_BTC.min(-1)),
        jnp.sum(chosen_BTC, axis=(0, 1)),
    )
