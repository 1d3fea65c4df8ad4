"""Routers fitted layer by layer: each layer of an MoE model comes nearer to the teacher's, by its router alone.

With the choice of experts fixed, routing weights a(R) are a smooth function of the router R. Linearised, the squared
distance to the teacher's output y,

    Σ_t ‖F_t (a_t + J_t ΔR) − y_t‖²  =  Σ_t (…)ᵀ G_t (…) − 2 (…)ᵀ b_t + ‖y_t‖²,   G_t = F_tᵀ F_t,  b_t = F_tᵀ y_t,

is a ridge regression of the change ΔR (a Gauss-Newton step), which conjugate gradients solve without forming its
normal equations: they would have D·E rows. A step is taken as far as the true error falls, choices changing with it.

B batch, T tokens (or sequence), D embed, E experts, L MoE layers.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from convert.experts.outputs import einsum, expert_products, routing
from convert.layerwise import LayerwiseModel
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.model.layers import rms_norm
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import Tree
from nemoe_jax.utils.progress import progress_bar

ROUNDS = 3  # linearisations
ITERATIONS = 30  # of conjugate gradients in each
SHARES = (1.0, 0.5, 0.25, 0.1, 0.0)  # of a step, of which the best is taken


def ridge_routers(
    student: Checkpoint, teacher: Checkpoint, batches: Sequence[np.ndarray], old_LDE: np.ndarray, ridge: float
) -> np.ndarray:
    """Routers (L, D, E) with which each layer comes nearer to the teacher's, on what the layers before it give.

    Args:
        batches: tokens (B, T + 1), int32.
        ridge: how strongly the old router is held to, in units of the mean curvature.
    """
    layers, taught = LayerwiseModel(student), LayerwiseModel(teacher)
    config, new_LDE = student.config, old_LDE.copy()
    streams = [layers.embed(tokens_BS[:, :-1]) for tokens_BS in batches]
    with progress_bar() as bar:
        for layer in bar.track(range(config.layers), description="fitting routers"):
            weights = layers.weights(layer)
            # one program at a time: on several CPU devices, programs that communicate starve one another
            entered = [jax.block_until_ready(layers.attend(layer, weights, x_BTD)) for x_BTD in streams]
            if "router" in weights["ffn"]:
                number = layer - config.dense_layers
                weights["ffn"]["router"] = jax.device_put(new_LDE[number], layers.whole)
                products = _products(layers, taught, layer, weights, entered)
                new_LDE[number] = fitted_router(config, jnp.asarray(new_LDE[number]), *products, ridge)
                weights["ffn"]["router"] = jax.device_put(new_LDE[number], layers.whole)
            streams = [
                jax.block_until_ready(middle_BTD + layers.feed_forward(layer, weights, x_BTD))
                for middle_BTD, x_BTD in entered
            ]
    return new_LDE


def _products(
    layers: LayerwiseModel,
    taught: LayerwiseModel,
    layer: int,
    weights: Tree,
    entered: Sequence[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, ...]:
    """The router's inputs (T, D), G (T, E, E) and b (T, E), where y is what the teacher's layer makes of the stream.

    A shared expert's output counts as part of y.
    """
    teacher_weights = taught.weights(layer)
    parts = []
    for middle_BTD, x_BTD in entered:
        read_BTD = rms_norm(middle_BTD, teacher_weights["ffn_norm"], taught.config.norm_eps)
        wanted_BTD = taught.feed_forward(layer, teacher_weights, read_BTD)
        missing_BTD = wanted_BTD - layers.feed_forward(layer, weights, x_BTD)
        logits_TE, gram_TEE, missing_TE = expert_products(weights["ffn"], x_BTD, missing_BTD)
        weights_TE, _ = routing(layers.config, logits_TE)
        moment_TE = missing_TE + einsum("TEG,TG->TE", gram_TEE, weights_TE)
        parts.append(jax.device_get((x_BTD.reshape(-1, x_BTD.shape[-1]), gram_TEE, moment_TE)))
    return tuple(jnp.asarray(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def fitted_router(
    config: ModelConfig, router_DE: jax.Array, x_TD: jax.Array, gram_TEE: jax.Array, moment_TE: jax.Array, ridge: float
) -> jax.Array:
    """The router (D, E) after a few ridge regressions of its change; never a larger error than the old one's."""

    def weights(router_DE):
        return routing(config, einsum("TD,DE->TE", x_TD, router_DE))[0]

    def apply(weights_TE):
        return einsum("TEG,TG->TE", gram_TEE, weights_TE)

    def error(router_DE):
        weights_TE = weights(router_DE)
        return jnp.sum(weights_TE * (apply(weights_TE) - 2 * moment_TE))

    probe_DE = jax.random.rademacher(jax.random.key(0), router_DE.shape, jnp.float32)

    def step(router_DE, _):
        weights_TE, forward = jax.linearize(weights, router_DE)
        backward = jax.linear_transpose(forward, router_DE)

        def curvature(change_DE):
            return backward(apply(forward(change_DE)))[0]

        mean = jnp.vdot(probe_DE, curvature(probe_DE)) / probe_DE.size  # of the diagonal (Hutchinson's estimate)
        change_DE, _ = jax.scipy.sparse.linalg.cg(
            lambda change_DE: curvature(change_DE) + ridge * mean * change_DE,
            backward(moment_TE - apply(weights_TE))[0],
            maxiter=ITERATIONS,
        )
        trials = router_DE + jnp.array(SHARES)[:, None, None] * change_DE
        return trials[jnp.argmin(jax.lax.map(error, trials))], None

    return jax.lax.scan(step, router_DE, length=ROUNDS)[0]
