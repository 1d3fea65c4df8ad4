"""The experts' whole FFN on CPU in float32, tile by tile: what one product leaves is still in cache for the next.

    y[token] += weight · (silu(x @ gate) * (x @ up)) @ down        for each token and each of its experts

A tile gathers its own tokens' x and keeps no more than gate's and up's outputs for the gradient, which computes the
rest again. Adapters are added to their expert's weights before its tiles, in float32: with many rows to an expert that
takes fewer products than the low-rank path, and leaves nothing to keep. Their gradients stay low-rank.

T tokens, D embed, E experts, C top-k, R = T·C rows sorted by expert, F expert_ffn, K rank, M rows of a tile.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from nemoe_jax.kernels.grouped_matmul.cpu import dot, for_each_tile, pick
from nemoe_jax.spec.schema import Tree


class Adapter(Protocol):
    """A low-rank update `scale · a @ b` of the experts' weights, (E, inputs, K) and (E, K, outputs); a pytree."""

    @property
    def a(self) -> Any: ...
    @property
    def b(self) -> Any: ...
    @property
    def scale(self) -> float: ...


class TokenOrder(NamedTuple):
    """The choices of all tokens, sorted by expert; those of experts that are not held come last."""

    order_R: jax.Array  # which of the T·C choices lies in a row
    place_TC: jax.Array  # the row where each choice went
    sizes_E: jax.Array

    @property
    def token_R(self) -> jax.Array:
        return self.order_R // self.place_TC.shape[1]

    @property
    def held_TC(self) -> jax.Array:
        """Whether the choice's expert is held: other rows are undefined."""
        return self.place_TC < jnp.sum(self.sizes_E)

    def weights_R1(self, weights_TC: jax.Array) -> jax.Array:
        """Each row's routing weight."""
        return weights_TC.reshape(-1)[self.order_R][:, None]

    def sum(self, y_RD: jax.Array) -> jax.Array:
        """The sum of each token's rows, (T, D)."""
        pairs = zip(self.place_TC.T, self.held_TC.T, strict=True)
        return functools.reduce(jnp.add, (jnp.where(held[:, None], y_RD[place], 0) for place, held in pairs))


@jax.custom_vjp
def fused_moe_ffn(
    x_TD: jax.Array, weights_TC: jax.Array, experts: Tree, adapters: Mapping[str, Adapter], rows: TokenOrder
) -> jax.Array:
    """What the experts add to each token, (T, D); differentiable in all but the rows' order.

    No gradient of experts that nobody differentiates is computed.
    """
    return _sums(x_TD, weights_TC, experts, adapters, rows, keep=False)[0]


def _merged(name: str, experts: Tree, adapters: Tree, expert: jax.Array) -> jax.Array:
    w = pick(experts[name], expert)
    return w + dot(pick(adapters[name].a, expert), _scaled_b(adapters[name], expert)) if name in adapters else w


def _scaled_b(adapter: Adapter, expert: jax.Array) -> jax.Array:
    return adapter.scale * pick(adapter.b, expert)


def _gate_up(experts: Tree, adapters: Tree, expert: jax.Array) -> jax.Array:
    """Both side by side, (D, 2 F)."""
    return jnp.concatenate([_merged(name, experts, adapters, expert) for name in ("gate", "up")], axis=1)


def _sums(x_TD, weights_TC, experts, adapters, rows, keep=True):
    """(each token's sum, and if they are to be kept gate's and up's outputs side by side)."""
    token_R, weights_R1 = rows.token_R, rows.weights_R1(weights_TC)

    def prepare(expert):
        return _gate_up(experts, adapters, expert), _merged("down", experts, adapters, expert)

    def work(tile, prepared, carry):
        (gate_up, down), (y_RD, both_RF) = prepared, carry
        both_MF = dot(x_TD[tile.read(token_R)], gate_up)
        gate_MF, up_MF = jnp.split(both_MF, 2, axis=1)
        hidden_MF = jax.nn.silu(gate_MF) * up_MF * tile.read(weights_R1)
        return tile.write(y_RD, dot(hidden_MF, down)), tile.write(both_RF, both_MF) if keep else None

    count, narrow = len(token_R), experts["gate"].shape[2]
    start = jnp.zeros((count, x_TD.shape[1])), jnp.zeros((count, 2 * narrow)) if keep else None
    y_RD, both_RF = for_each_tile(rows.sizes_E, count, prepare, work, start)
    return rows.sum(y_RD), both_RF


def _forward(*arguments):
    values = jax.tree.map(lambda primal: primal.value, arguments)
    differentiated = any(primal.perturbed for primal in jax.tree.leaves(arguments[2]))
    y_TD, both_RF = _sums(*values)
    return y_TD, (values, both_RF, () if differentiated else None)  # a residual must be a tree


def _backward(residuals, dy_TD):
    (x_TD, weights_TC, experts, adapters, rows), both_RF, differentiated = residuals
    token_R, weights_R1 = rows.token_R, rows.weights_R1(weights_TC)
    many, width, narrow = experts["gate"].shape
    columns = {"gate": (0, narrow), "up": (narrow, 2 * narrow)}  # among those of both
    first = [name for name in columns if name in adapters]
    ranks = {name: adapter.a.shape[2] for name, adapter in adapters.items()}

    def prepare(expert):
        """Weights, and below them b, so that one product gives the gradients of a map's input and of x @ a; and a."""
        rows_of_b = [
            jnp.zeros((ranks[name], 2 * narrow)).at[:, slice(*columns[name])].set(_scaled_b(adapters[name], expert))
            for name in first
        ]
        gate_up = jnp.concatenate([_gate_up(experts, adapters, expert), *rows_of_b])
        a_first = jnp.concatenate([pick(adapters[name].a, expert) for name in first], axis=1) if first else None
        down, a_down = _merged("down", experts, adapters, expert), None
        if "down" in adapters:
            down = jnp.concatenate([down, _scaled_b(adapters["down"], expert)])
            a_down = pick(adapters["down"].a, expert)
        return gate_up, a_first, down, a_down

    def work(tile, prepared, carry):
        (gate_up, a_first, down, a_down), sums = prepared, dict(carry)
        token_M, weights_M1 = tile.read(token_R), tile.read(weights_R1)
        x_MD, dy_MD = x_TD[token_M], tile.own(dy_TD[token_M])  # the others' zeros reach all gradients
        gate_MF, up_MF = jnp.split(tile.read(both_RF), 2, axis=1)
        gated_MF, of_silu = jax.vjp(jax.nn.silu, gate_MF)
        hidden_MF = gated_MF * up_MF
        dhidden_MF, dlow_MK = jnp.split(dot(dy_MD, down, (1, 1)), [narrow], axis=1)
        sums["weights"] = tile.write(sums["weights"], jnp.sum(dhidden_MF * hidden_MF, axis=1, keepdims=True))
        hidden_MF, dhidden_MF = hidden_MF * weights_M1, dhidden_MF * weights_M1
        dboth_MF = jnp.concatenate([of_silu(dhidden_MF * up_MF)[0], dhidden_MF * gated_MF], axis=1)
        dx_MD, dlows_MK = jnp.split(dot(dboth_MF, gate_up, (1, 1)), [width], axis=1)
        sums["x"] = tile.write(sums["x"], dx_MD)
        # a's gradients are summed transposed: a product that is wide rather than tall is twice as fast
        products: dict[str, tuple[jax.Array, jax.Array]] = {}
        if a_first is not None:
            products |= {"a": (dlows_MK, x_MD), "b": (dot(x_MD, a_first), dboth_MF)}
        if a_down is not None:
            products |= {"a down": (dlow_MK, hidden_MF), "b down": (dot(hidden_MF, a_down), dy_MD)}
        if differentiated is not None:
            products |= {"gate up": (x_MD, dboth_MF), "down": (hidden_MF, dy_MD)}
        return sums | {name: tile.add(sums[name], dot(left, right, (0, 0))) for name, (left, right) in products.items()}

    inner = sum(ranks[name] for name in first)
    shapes: dict[str, tuple[int, ...]] = {"x": (len(token_R), width), "weights": (len(token_R), 1)}
    if first:
        shapes |= {"a": (many, inner, width), "b": (many, inner, 2 * narrow)}
    if "down" in adapters:
        shapes |= {"a down": (many, ranks["down"], narrow), "b down": (many, ranks["down"], width)}
    if differentiated is not None:
        shapes |= {"gate up": (many, width, 2 * narrow), "down": (many, narrow, width)}
    start = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    sums = for_each_tile(rows.sizes_E, len(token_R), prepare, work, start)

    dexperts = jax.tree.map(jnp.zeros_like, experts)
    if differentiated is not None:
        gate, up = jnp.split(sums["gate up"], 2, axis=2)
        dexperts = {"gate": gate, "up": up, "down": sums["down"]}
    factors = {"down": (sums["a down"], sums["b down"])} if "down" in adapters else {}
    ends = itertools.accumulate(ranks[name] for name in first)
    for name, end in zip(first, ends, strict=True):
        own = slice(end - ranks[name], end)
        factors[name] = sums["a"][:, own], sums["b"][:, own, slice(*columns[name])]
    dweights_TC = jnp.where(rows.held_TC, sums["weights"][:, 0][rows.place_TC], 0)
    return rows.sum(sums["x"]), dweights_TC, dexperts, _as_adapters(adapters, factors), None


def _as_adapters(adapters: Tree, factors: dict[str, Any]) -> Tree:
    """Gradients of the adapters from those of a, transposed, and of b before its scale."""
    of_leaves = {
        name: [factors[name][0].swapaxes(1, 2), adapter.scale * factors[name][1]] for name, adapter in adapters.items()
    }
    return {name: jax.tree.unflatten(jax.tree.structure(adapters[name]), pair) for name, pair in of_leaves.items()}


fused_moe_ffn.defvjp(_forward, _backward, symbolic_zeros=True)
