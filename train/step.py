"""One update and one evaluation, compiled.

What is trained is one tree, {"params": {path: float32 master weight}, "adapters": …}, and everything else of the model
is frozen, {path: weight}. Only the first is differentiated, so that no gradient of a frozen weight is ever computed.

Letters: B batch, T sequence, S = T + 1 (inputs and targets overlap), L layers, E experts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from nemoe_jax.config import ModelConfig
from nemoe_jax.schema import Tree, leaves, unflatten
from nemoe_jax.transformer import Output, forward
from train.loss import cross_entropy, forward_kl
from train.optimizer import is_router
from train.recipe import Recipe

Flat = dict[str, Array]  # {path: array}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """What an update replaces."""

    step: Array  # updates done, int32
    trainable: Tree
    optimizer_state: Any


def split(params: Tree, trains: Callable[[str], bool]) -> tuple[Flat, Flat]:
    """The model's parameters as (trained: in float32, frozen: as they are), by path."""
    flat = leaves(params)
    trained = {path: array.astype(jnp.float32) for path, array in flat.items() if trains(path)}
    return trained, {path: array for path, array in flat.items() if path not in trained}


def combine(trained: Flat, frozen: Flat) -> Tree:
    """The model's parameters again; the inverse of `split`."""
    return unflatten(frozen | trained)


def initial_state(trainable: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update; scalars are on every device, all else lies where the trained weights do."""
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    example = jax.tree.leaves(trainable)[0].sharding
    everywhere = NamedSharding(example.mesh, PartitionSpec()) if isinstance(example, NamedSharding) else example

    def place(array: Array) -> Array:
        # placed expressly, as the update's results are: otherwise its second call would compile it again
        return jax.device_put(array, array.sharding if isinstance(array.sharding, NamedSharding) else everywhere)

    return jax.tree.map(place, state)


def load_max_over_mean(load_LE: Array) -> Array:
    """Busiest expert's share over the mean share, averaged over the layers: 1 is perfect balance."""
    return jnp.mean(jnp.max(load_LE, axis=-1) * load_LE.shape[-1])


@dataclasses.dataclass(frozen=True)
class Objective:
    """The recipe's loss as a function of arrays."""

    recipe: Recipe
    config: ModelConfig
    teacher_config: ModelConfig | None
    eos_id: int | None

    def student(self, trainable: Tree, frozen: Flat, tokens_BT: Array, segments_BT: Array | None) -> Output:
        """The model's output; master weights are rounded to the dtype of computation, routers excepted."""
        dtype = jnp.dtype(self.recipe.dtype)

        def rounded(path: tuple[Any, ...], array: Array) -> Array:
            # bfloat16 ties in the router's logits would change the chosen experts
            return array if is_router(path) else array.astype(dtype)

        params = combine(jax.tree_util.tree_map_with_path(rounded, trainable["params"]), frozen)
        return forward(
            self.config,
            params,
            tokens_BT,
            adapters=trainable["adapters"] or None,
            segments=segments_BT,
            remat=self.recipe.remat,
        )

    def segments(self, tokens_BS: Array) -> tuple[Array | None, Array | None]:
        """(segment of each input, mask of the targets within their input's document); None where all is one segment."""
        if not self.recipe.data.separate_documents or self.eos_id is None:
            return None, None
        ends_BS = (tokens_BS == self.eos_id).astype(jnp.int32)
        segments_BS = jnp.cumsum(ends_BS, axis=1) - ends_BS
        return segments_BS[:, :-1], segments_BS[:, 1:] == segments_BS[:, :-1]

    def loss(
        self, trainable: Tree, frozen: Flat, teacher: Tree | None, tokens_BS: Array
    ) -> tuple[Array, dict[str, Array]]:
        """(the loss, its parts): the weighted sum that the recipe asks for, in nats per token."""
        recipe, inputs_BT, targets_BT = self.recipe, tokens_BS[:, :-1], tokens_BS[:, 1:]
        segments_BT, mask_BT = self.segments(tokens_BS)
        output = self.student(trainable, frozen, inputs_BT, segments_BT)
        parts = {"cross_entropy": cross_entropy(output.logits, targets_BT, mask_BT)}
        total = parts["cross_entropy"]
        if recipe.distill and self.teacher_config and teacher is not None:
            teacher_logits_BTV = forward(self.teacher_config, teacher, inputs_BT, segments=segments_BT).logits
            parts["kl"] = forward_kl(output.logits, jax.lax.stop_gradient(teacher_logits_BTV), mask_BT)
            total = recipe.distill.kl_weight * parts["kl"] + recipe.distill.ce_weight * parts["cross_entropy"]
        if output.routing is not None:
            parts["balance_loss"], parts["z_loss"] = output.routing.balance_loss, output.routing.z_loss
            parts["load_max_over_mean"] = load_max_over_mean(output.routing.load_E)
            total += recipe.balance_loss_weight * parts["balance_loss"] + recipe.z_loss_weight * parts["z_loss"]
        return total, parts

    def held_out(self, trainable: Tree, frozen: Flat, tokens_BS: Array, weights_B: Array) -> dict[str, Array]:
        """Sums over the rows of weight 1: "loss" (nats), "tokens"; and "load" (L, E) of a mixture, times the tokens."""
        segments_BT, mask_BT = self.segments(tokens_BS)
        output = self.student(trainable, frozen, tokens_BS[:, :-1], segments_BT)
        mask_BT = weights_B[:, None] * (jnp.ones_like(output.logits[..., 0]) if mask_BT is None else mask_BT)
        tokens = mask_BT.sum()
        sums = {"loss": cross_entropy(output.logits, tokens_BS[:, 1:], mask_BT) * tokens, "tokens": tokens}
        if output.routing is not None:
            sums["load"] = output.routing.load_E * tokens
        return sums


def make_update(
    objective: Objective, optimizer: optax.GradientTransformation, schedule: optax.Schedule, state: TrainState
) -> Callable[[TrainState, Flat, Tree | None, Array], tuple[TrainState, dict[str, Array]]]:
    """Compiles (state, frozen, teacher, tokens (B, S)) → (next state, figures); the state's memory is used again.

    Args:
        state: an example, whose shardings the next states keep.
    """

    def update(
        state: TrainState, frozen: Flat, teacher: Tree | None, tokens_BS: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        (loss, parts), gradient = jax.value_and_grad(objective.loss, has_aux=True)(
            state.trainable, frozen, teacher, tokens_BS
        )
        updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.trainable)
        figures = {
            "loss": loss,
            **parts,
            "gradient_norm": optax.global_norm(gradient),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), optimizer_state), figures

    shardings = jax.tree.map(lambda array: array.sharding, state)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
