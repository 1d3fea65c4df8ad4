"""The experts' whole FFN on CPU in float32, tile of rows by tile: what one product leaves is still in cache for the next.

    y[token] += weight · silu(x @ gate) * (x @ up) @ down        for each token and each of its experts

A tile gathers its own tokens' x and keeps no more than gate's and up's outputs for the gradient, which recomputes the
rest. Adapters are added to their expert's weights before its tiles, in float32: with many rows to an expert that takes
fewer products than the low-rank path, and there is nothing of it to keep.

T tokens, D embed, E experts, C top-k, R = T·C rows sorted by expert, F expert_ffn, K rank, M rows of a tile.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nemoe_jax.grouped_matmul_cpu import Tile, dot, for_each_tile, pick
from nemoe_jax.schema import Tree

Adapters = dict[str, Any]


class Sorted(NamedTuple):
    """The choices of all tokens, sorted by expert; those of experts that are not held come last."""

    order_R: jax.Array  # which of the T·C choices lies in a row
    place_TC: jax.Array  # and the row where each choice went
    sizes_E: jax.Array

    @property
    def token_R(self) -> jax.Array:
        return self.order_R // self.place_TC.shape[1]

    @property
    def held_TC(self) -> jax.Array:
        """Whether the choice's expert is held: the other choices' rows are undefined."""
        return self.place_TC < jnp.sum(self.sizes_E)

    def sum(self, y_RD: jax.Array) -> jax.Array:
        """The sum of each token's rows, (T, D)."""
        pairs = zip(self.place_TC.T, self.held_TC.T, strict=True)
        return functools.reduce(jnp.add, (jnp.where(held[:, None], y_RD[place], 0) for place, held in pairs))


def pays(x: jax.Array, experts: Tree, adapters: Adapters, rows: int) -> bool:
    """Whether `tiled_ffn` takes fewer products than the grouped matmuls one by one, and is as exact."""
    many, width, narrow = experts["gate"].shape
    merged = rows * (width + narrow) >= many * width * narrow if adapters else True
    return merged and x.dtype == experts["gate"].dtype == jnp.float32 and all(a.key is None for a in adapters.values())


@jax.custom_vjp
def tiled_ffn(x_TD: jax.Array, weights_TC: jax.Array, experts: Tree, adapters: Adapters, rows: Sorted) -> jax.Array:
    """What the experts add to each token, (T, D); differentiable in all but the rows' order."""
    return _products(x_TD, weights_TC, experts, adapters, rows)[0]


def _merged(name: str, experts: Tree, adapters: Adapters, expert: jax.Array) -> jax.Array:
    w = pick(experts[name], expert)
    if name not in adapters:
        return w
    one = adapters[name]
    return w + dot(one.scale * pick(one.a, expert), pick(one.b, expert))


def _gate_up(experts: Tree, adapters: Adapters, expert: jax.Array) -> jax.Array:
    """(D, 2 F)."""
    return jnp.concatenate([_merged(name, experts, adapters, expert) for name in ("gate", "up")], axis=1)


def _weights_of(weights_TC: jax.Array, rows: Sorted) -> jax.Array:
    return weights_TC.reshape(-1)[rows.order_R][:, None]


def _products(x_TD, weights_TC, experts, adapters, rows):
    """(the sums, gate's and up's outputs side by side)."""
    token_R, weights_R1 = rows.token_R, _weights_of(weights_TC, rows)

    def prepare(expert):
        return _gate_up(experts, adapters, expert), _merged("down", experts, adapters, expert)

    def work(tile, prepared, carry):
        gate_up, down = prepared
        y_RD, both_RF = carry
        both_MF = dot(x_TD[tile.read(token_R)], gate_up)
        gate_MF, up_MF = jnp.split(both_MF, 2, axis=1)
        hidden_MF = jax.nn.silu(gate_MF) * up_MF * tile.read(weights_R1)
        return tile.write(y_RD, dot(hidden_MF, down)), tile.write(both_RF, both_MF)

    count, narrow = len(token_R), experts["gate"].shape[2]
    nothing = jnp.zeros((count, x_TD.shape[1])), jnp.zeros((count, 2 * narrow))
    y_RD, both_RF = for_each_tile(rows.sizes_E, count, prepare, work, nothing)
    return rows.sum(y_RD), both_RF


def _forward(*arguments):
    values = jax.tree.map(lambda primal: primal.value, arguments)
    trains = any(primal.perturbed for primal in jax.tree.leaves(arguments[2]))
    y_TD, both_RF = _products(*values)
    return y_TD, (values, both_RF, () if trains else None)


def _backward(residuals, dy_TD):
    (x_TD, weights_TC, experts, adapters, rows), both_RF, trains = residuals
    token_R, weights_R1 = rows.token_R, _weights_of(weights_TC, rows)
    width, narrow = experts["gate"].shape[1:]
    first = [name for name in ("gate", "up") if name in adapters]
    ranks = [adapters[name].a.shape[2] for name in first]

    def prepare(expert):
        """Products with them give a map's gradient and beside it those of its adapters' inner rows."""
        gate_up = [_gate_up(experts, adapters, expert)]
        for name in first:
            b = adapters[name].scale * pick(adapters[name].b, expert)
            gate_up.append(jnp.pad(b, ((0, 0), (0, narrow) if name == "gate" else (narrow, 0))))
        down = [_merged("down", experts, adapters, expert)]
        if "down" in adapters:
            down.append(adapters["down"].scale * pick(adapters["down"].b, expert))
        a = [pick(adapters[name].a, expert) for name in first]
        low = jnp.concatenate(a, axis=1) if a else None
        return (
            jnp.concatenate(gate_up),
            jnp.concatenate(down),
            low,
            pick(adapters["down"].a, expert) if "down" in adapters else None,
        )

    def work(tile, prepared, carry):
        gate_up, down, low_first, low_down = prepared
        carry = dict(carry)
        token_M = tile.read(token_R)
        x_MD, dy_MD = x_TD[token_M], tile.own(dy_TD[token_M])
        gate_MF, up_MF = jnp.split(tile.read(both_RF), 2, axis=1)
        weights_M1 = tile.read(weights_R1)
        gated_MF, of_silu = jax.vjp(jax.nn.silu, gate_MF)
        hidden_MF = gated_MF * up_MF
        dhidden_MF, dlow_MK = jnp.split(dot(dy_MD, down, (1, 1)), [narrow], axis=1)
        carry["weights"] = tile.write(carry["weights"], jnp.sum(dhidden_MF * hidden_MF, axis=1, keepdims=True))
        dhidden_MF *= weights_M1
        both_MF = jnp.concatenate([of_silu(dhidden_MF * up_MF)[0], dhidden_MF * gated_MF], axis=1)
        weighted_MF = hidden_MF * weights_M1
        dx_MD, dlows_MK = jnp.split(dot(both_MF, gate_up, (1, 1)), [width], axis=1)
        carry["x"] = tile.write(carry["x"], dx_MD)
        if low_first is not None:
            carry["a first"] = tile.add(carry["a first"], dot(dlows_MK, x_MD, (0, 0)))
            carry["b first"] = tile.add(carry["b first"], dot(dot(x_MD, low_first), both_MF, (0, 0)))
        if low_down is not None:
            carry["a down"] = tile.add(carry["a down"], dot(dlow_MK, weighted_MF, (0, 0)))
            carry["b down"] = tile.add(carry["b down"], dot(dot(weighted_MF, low_down), dy_MD, (0, 0)))
        if trains is not None:
            carry["first"] = tile.add(carry["first"], dot(x_MD, both_MF, (0, 0)))
            carry["down"] = tile.add(carry["down"], dot(weighted_MF, dy_MD, (0, 0)))
        return carry

    many = len(rows.sizes_E)
    shapes = {"x": (len(token_R), width), "weights": (len(token_R), 1)}
    if first:
        shapes |= {"a first": (many, sum(ranks), width), "b first": (many, sum(ranks), 2 * narrow)}
    if "down" in adapters:
        rank = adapters["down"].a.shape[2]
        shapes |= {"a down": (many, rank, narrow), "b down": (many, rank, width)}
    if trains is not None:
        shapes |= {"first": (many, width, 2 * narrow), "down": (many, narrow, width)}
    sums = for_each_tile(
        rows.sizes_E, len(token_R), prepare, work, {name: jnp.zeros(shape) for name, shape in shapes.items()}
    )
    dweights_TC = jnp.where(rows.held_TC, sums["weights"][:, 0][rows.place_TC], 0)
    dexperts = jax.tree.map(jnp.zeros_like, experts)
    if trains is not None:
        gate, up = jnp.split(sums["first"], 2, axis=2)
        dexperts = {"gate": gate, "up": up, "down": sums["down"]}
    dadapters, start = {}, 0
    for name, rank in zip(first, ranks, strict=True):
        a = sums["a first"][:, start : start + rank]
        columns = slice(0, narrow) if name == "gate" else slice(narrow, None)
        b = sums["b first"][:, start : start + rank, columns]
        dadapters[name] = (a, b)
        start += rank
    if "down" in adapters:
        dadapters["down"] = (sums["a down"], sums["b down"])
    dadapters = {
        name: jax.tree.unflatten(jax.tree.structure(adapters[name]), [a.swapaxes(1, 2), adapters[name].scale * b])
        for name, (a, b) in dadapters.items()
    }
    return rows.sum(sums["x"]), dweights_TC, dexperts, dadapters, None


tiled_ffn.defvjp(_forward, _backward, symbolic_zeros=True)
