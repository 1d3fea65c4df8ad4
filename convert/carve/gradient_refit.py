"""Refit by gradient: the weights of each group of experts on the tokens that choose it, layer by layer.

The ridge regression of a carve moves `down` alone. Here gate, up and down of a group follow the gradient of the same
error, Σ_t weight_t·‖FFN(x_t) − y_t‖², with the router's choices fixed. Every step takes as many tokens of each group,
out of one batch of the text. Adam moves each array by a share of its root mean square.

C groups, D embed, S neurons of a group, B batch, T sequence, N tokens drawn for a group.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from convert.carve.calibration import LayerText
from nemoe_jax.spec.schema import Tree

STEP = 0.02  # of an array's root mean square, in Adam's first step; falls to 0 along a cosine

_ADAM = optax.scale_by_adam()


def refit_by_gradient(
    text: LayerText, labels: Sequence[np.ndarray], ffn: Tree, steps: int, key: jax.Array, shared: int = 0
) -> Tree:
    """The groups' FFNs after so many steps.

    Args:
        labels: the group of each token, (B, T) for each batch of the text.
        ffn: gate, up (C, D, S) and down (C, S, D).
        key: of the order of the batches and of the tokens drawn.
        shared: how many of each group's neurons, its first, are the same in all groups and stay so.
    """
    groups, random = len(ffn["down"]), np.random.default_rng(np.asarray(jax.random.key_data(key)))
    drawn = max(labels[0].size // groups, 1)
    energy = text.energy
    scale = {name: STEP * jnp.sqrt(jnp.mean(array**2)) for name, array in ffn.items()}
    apart = _apart(ffn, shared)
    state = _ADAM.init(apart)
    order: list[int] = []
    for step in range(steps):
        order = order or [int(number) for number in random.permutation(len(labels))]
        number = order.pop()
        index_CN, share_C = _draw(random, labels[number].reshape(-1), groups, drawn)
        rate = 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = text.inputs[number], text.wanted[number], text.weights[number]
        apart, state = _step(apart, state, scale, *batch, index_CN, share_C / energy, jnp.asarray(rate, jnp.float32))
        jax.block_until_ready(apart)
    return _together(apart)


def _apart(ffn: Tree, shared: int) -> dict[str, Tree]:
    """What the groups share, once, and what each has alone."""
    cut = {name: (array if name == "down" else array.swapaxes(1, 2)) for name, array in ffn.items()}
    return {
        "shared": {name: array[:1, :shared] for name, array in cut.items()},
        "own": {name: array[:, shared:] for name, array in cut.items()},
    }


def _together(apart: dict[str, Tree]) -> Tree:
    """The inverse of `_apart`."""
    ffn = {}
    for name, own in apart["own"].items():
        common = jnp.broadcast_to(apart["shared"][name], (len(own), *apart["shared"][name].shape[1:]))
        ffn[name] = jnp.concatenate([common, own], axis=1)
    return {name: (array if name == "down" else array.swapaxes(1, 2)) for name, array in ffn.items()}


def group_output(ffn: Tree, x_ND: jax.Array, shares_NS: jax.Array | float = 1.0) -> jax.Array:
    """The SwiGLU FFN of one group: gate, up (D, S) and down (S, D); its neurons times `shares_NS`."""
    matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return matmul(shares_NS * jax.nn.silu(matmul(x_ND, ffn["gate"])) * matmul(x_ND, ffn["up"]), ffn["down"])


def _draw(random: np.random.Generator, label_N: np.ndarray, groups: int, drawn: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (C, N) of tokens of each group, and each group's share (C,) of the batch."""
    own = [np.flatnonzero(label_N == group) for group in range(groups)]
    index = [
        random.choice(tokens, drawn, replace=len(tokens) < drawn) if len(tokens) else np.zeros(drawn, np.int64)
        for tokens in own
    ]
    return np.stack(index), np.array([len(tokens) / len(label_N) for tokens in own], np.float32)


@functools.partial(jax.jit, donate_argnums=1)
def _step(apart, state, scale, x_BTD, y_BTD, weight_BT, index_CN, share_C, rate):
    x_CND, y_CND = (array.reshape(-1, array.shape[-1])[index_CN] for array in (x_BTD, y_BTD))
    weight_CN = weight_BT.reshape(-1)[index_CN]

    def loss(apart):
        square_CN = jnp.sum((jax.vmap(group_output)(_together(apart), x_CND) - y_CND) ** 2, axis=-1)
        return jnp.sum(share_C * jnp.mean(square_CN * weight_CN, axis=-1))

    direction, state = _ADAM.update(jax.grad(loss)(apart), state)
    moved = {
        part: {name: array - rate * scale[name] * direction[part][name] for name, array in tree.items()}
        for part, tree in apart.items()
    }
    return moved, state
