"""The gate of a shared expert, fitted: on which tokens it counts for more, and on which for less.

A shared expert is multiplied by σ(u·x). A gate of zeros is a constant half, for which its `down` is doubled; the fits
before this one take it so. Here u follows the gradient of the error with everything else as it is. With a_t the
shared expert's output at gate 1/2, r_t what the group of the token leaves to do and g_t = 2σ(u·x_t), the error of a
token is |a|²g² - 2(a·r)g and a constant, hence two numbers a token are all that the steps need.

B batch, T sequence, D embed, S neurons of a group.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from convert.carve.calibration import LayerText
from convert.carve.gradient_refit import group_output
from convert.layerwise import in_turn
from nemoe_jax.spec.schema import Tree

STEPS = 200  # each on one batch
LOGIT_STEP = 0.05  # how far Adam's first step may move a token's logit; falls to 0 along a cosine

_ADAM = optax.scale_by_adam()
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def fit_gate(text: LayerText, labels: Sequence[np.ndarray], ffn: Tree, gated: int) -> jax.Array:
    """The gate's row (D,).

    Args:
        labels: the group of each token, (B, T) for each batch of the text.
        ffn: gate, up (C, D, S) and down (C, S, D) of the groups.
        gated: how many of a group's neurons, its first, are the shared expert's.
    """
    batches = list(zip(text.inputs, text.wanted, text.weights, labels, strict=True))
    terms = list(in_turn(_terms(*batch, ffn, gated) for batch in batches))
    size = float(jnp.mean(jnp.sum(jnp.abs(text.inputs[0]), axis=-1)))
    gate_D = jnp.zeros(text.inputs[0].shape[-1])
    state = _ADAM.init(gate_D)
    for step in range(STEPS):
        number = step % len(batches)
        rate = LOGIT_STEP / size * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        gate_D, state = _step(gate_D, state, text.inputs[number], *terms[number], rate)
        jax.block_until_ready(gate_D)
    return gate_D


def gate_shares(gate_D: jax.Array, x_BTD: jax.Array, gated: int, neurons: int) -> jax.Array:
    """What the neurons of a group are multiplied by, (B, T, S): the first `gated` by 2σ(u·x), the others by 1."""
    return jnp.where(jnp.arange(neurons) < gated, _factor(gate_D, x_BTD)[..., None], 1.0)


def _factor(gate_D, x_BTD):
    return 2 * jax.nn.sigmoid(_einsum("BTD,D->BT", x_BTD, gate_D))


@functools.partial(jax.jit, static_argnames="gated")
def _terms(x_BTD, y_BTD, weight_BT, label_BT, ffn, gated):
    """|a|² and a·r of each token, by its weight and a share of the mean (B, T)."""

    def part(first, last):
        return {
            name: (array[:, first:last] if name == "down" else array[..., first:last]) for name, array in ffn.items()
        }

    shared_BTD = group_output(jax.tree.map(lambda array: array[0], part(0, gated)), x_BTD)
    own_CBTD = jax.lax.map(lambda group: group_output(group, x_BTD), part(gated, None))
    own_BTD = jnp.take_along_axis(own_CBTD, label_BT[None, ..., None], axis=0)[0]
    scale = jnp.mean(weight_BT * jnp.sum(shared_BTD**2, axis=-1))
    dot = functools.partial(_einsum, "BTD,BTD,BT->BT")
    return dot(shared_BTD, shared_BTD, weight_BT) / scale, dot(shared_BTD, y_BTD - own_BTD, weight_BT) / scale


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _step(gate_D, state, x_BTD, square_BT, product_BT, learning_rate):
    def loss(gate_D):
        gate_BT = _factor(gate_D, x_BTD)
        return jnp.mean(square_BT * gate_BT**2 - 2 * product_BT * gate_BT)

    direction_D, state = _ADAM.update(jax.grad(loss)(gate_D), state)
    return gate_D - learning_rate * direction_D, state
