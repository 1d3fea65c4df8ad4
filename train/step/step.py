"""One update and one evaluation, compiled.

What is trained is one tree, {"params": {path: float32 master weight}, "adapters": …}, and everything else of the model
is frozen, {path: weight}. Only the first is differentiated, so that no gradient of a frozen weight is ever computed.

Letters: B batch, T sequence, D embed, L layers, E experts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from nemoe_jax.adapters import lora
from nemoe_jax.model import transformer
from nemoe_jax.model.next_token import token_logprobs
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.fp8_weight import FakeQuantized, Fp8Weight, is_quantized
from nemoe_jax.spec.router_ties import RouterTies
from nemoe_jax.spec.schema import Tree, declare, leaves, map_with_path, unflatten
from nemoe_jax.spec.sharding import compiler_options
from train.data.loader import Batch
from train.data.teacher_cache import TeacherBatch
from train.recipe import Phase, Recipe
from train.step.chosen_experts import ChosenExperts
from train.step.divergence import divergence, feature_distance, top_k_divergence
from train.step.loss import Sums, chunked_sums, masked_sum
from train.step.optimizer import is_router

Flat = dict[str, Any]  # {path: array, or Fp8Weight}
SCHEDULED = ("temperature", "kl_weight", "ce_weight", "feature_weight")  # of distillation


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """What an update replaces, and a checkpoint holds."""

    step: Any  # steps done, int32
    skipped: Any  # of them, those whose loss or gradient was not finite, int32
    key: Any  # of dropout; the step's number is folded in
    trainable: Tree
    optimizer_state: Any
    router_bias: Any = None  # (L, E) float32 of the MoE layers, while they are balanced without a loss


def split(params: Tree, trains: Callable[[str], bool], dtype: Any, copy: bool = True) -> tuple[Flat, Flat]:
    """The model's parameters as (trained: in float32, frozen: in `dtype`), by path.

    Args:
        copy: whether the trained weights are copies; updates use the memory of what they are given again.
    """
    flat = leaves(params)
    trained = {path: jnp.array(array, jnp.float32, copy=copy) for path, array in flat.items() if trains(path)}
    return trained, {
        path: array if isinstance(array, Fp8Weight) else array.astype(dtype)
        for path, array in flat.items()
        if path not in trained
    }


def combine(trained: Flat, frozen: Flat) -> Tree:
    """The model's parameters again; the inverse of `split`."""
    whole = {
        path: leaf.put_into(frozen[path]) if isinstance(leaf, ChosenExperts) else leaf for path, leaf in trained.items()
    }
    return unflatten(frozen | whole)


def state_shape(
    trainable: Tree, optimizer: optax.GradientTransformation, bias_shape: tuple[int, int] | None = None
) -> TrainState:
    """The state's shapes, dtypes and shardings, from those of what is trained (arrays, or shapes with shardings).

    The optimizer's averages are placed as their weights are, all else on every device.

    Args:
        bias_shape: (L, E) where routers have a bias.

    Raises:
        TypeError: something is trained in another dtype than float32. In bfloat16 Adam's decay of 0.999 is 1, its
            averages never forget, and small updates are lost in rounding.
    """
    others = {jnp.dtype(array.dtype).name for array in jax.tree.leaves(trainable)} - {"float32"}
    if others:
        raise TypeError(f"expected float32 for what is trained, got {', '.join(sorted(others))}")
    example = jax.tree.leaves(trainable)[0].sharding
    everywhere = NamedSharding(example.mesh, PartitionSpec()) if isinstance(example, NamedSharding) else example

    def shape(array: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

    optimizer_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda array, like: array if isinstance(array, optax.MaskedNode) else shape(array, like.sharding),
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda array: shape(array, everywhere),
        is_leaf=lambda array: isinstance(array, optax.MaskedNode),  # what another part of the optimizer trains
    )
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    key = shape(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))), everywhere)
    bias = bias_shape and jax.ShapeDtypeStruct(bias_shape, jnp.float32, sharding=everywhere)
    return TrainState(count, count, key, jax.tree.map(lambda a: shape(a, a.sharding), trainable), optimizer_state, bias)


def initial_state(
    trainable: Tree, optimizer: optax.GradientTransformation, seed: int, bias_shape: tuple[int, int] | None = None
) -> TrainState:
    """The state before the first update, each array where `state_shape` says."""
    shape = state_shape(trainable, optimizer, bias_shape)
    key = jax.random.key_data(jax.random.key(seed))
    step, skipped, key = jax.device_put((np.int32(0), np.int32(0), np.asarray(key)), shape.step.sharding)
    places = jax.tree.map(lambda array: array.sharding, shape.optimizer_state)
    bias = bias_shape and jax.device_put(np.zeros(bias_shape, np.float32), shape.router_bias.sharding)
    return TrainState(step, skipped, key, trainable, jax.jit(optimizer.init, out_shardings=places)(trainable), bias)


def load_max_over_mean(load_LE: Array) -> Array:
    """Busiest expert's share over the mean share, averaged over the layers: 1 is perfect balance."""
    return jnp.mean(jnp.max(load_LE, axis=-1) * load_LE.shape[-1])


@dataclasses.dataclass(frozen=True)
class Objective:
    """A phase's loss as a function of arrays."""

    recipe: Recipe
    phase: Phase
    config: ModelConfig
    teacher_config: ModelConfig | None
    _: dataclasses.KW_ONLY
    whole_groups: bool = False  # experts that share a router row are chosen together: see moe.with_gradient_of_groups
    all_count: bool = False  # for a program whose work is to be counted: the head computes every token

    def weight(self, batch: Any) -> Array:
        """What a batch's loss is a mean over: its targets that count."""
        return batch.mask.sum()

    def loss(
        self, trainable: Tree, frozen: Flat, teacher: Tree | None, batch: Any, step: Array | int = 0
    ) -> tuple[Array, Sums]:
        """(the loss, its parts): the weighted sum that the recipe asks for, in nats per target that counts.

        Args:
            step: updates done, for what changes on the way.
        """
        tokens = jnp.maximum(self.weight(batch), 1.0)
        hidden, (loss, sums) = self._through(trainable, frozen, teacher, batch, step)
        return self._with_routing(hidden, loss / tokens, {name: value / tokens for name, value in sums.items()})

    def _with_routing(self, hidden: transformer.HiddenOutput, total: Array, parts: Sums) -> tuple[Array, Sums]:
        """A loss and its parts with those of the routers."""
        if hidden.routing is not None:
            routing = hidden.routing
            parts |= {
                "balance_loss": routing.balance_loss,
                "z_loss": routing.z_loss,
                "router_entropy": routing.entropy,
                "load_max_over_mean": load_max_over_mean(routing.load_E),
                "dead_experts": jnp.sum(routing.load_E == 0).astype(jnp.float32),
                "load": routing.load_E,
            }
            total += self.phase.balance_loss_weight * routing.balance_loss
            total += self.phase.z_loss_weight * routing.z_loss
        return total, parts

    def held_out(self, trainable: Tree, frozen: Flat, batch: Any) -> Sums:
        """Sums over the targets that count: "loss" (nats), "weight"; and "load" (L, E) of MoE layers, times that."""
        hidden, (_, sums) = self._through(trainable, frozen, None, batch)
        return {"loss": sums["cross_entropy"], "weight": self.weight(batch)} | self._load(hidden, self.weight(batch))

    def gate_shares(self, frozen: Flat, batch: Any) -> Array:
        """The experts' routing weights (L, E) on a batch, summed over its tokens; of a model that is all frozen."""
        routing = self._hidden(self.config, unflatten(frozen), batch).routing
        assert routing is not None
        return routing.gate_E * jnp.sum(batch.segments > 0)

    @staticmethod
    def _load(hidden: transformer.HiddenOutput, weight: Array) -> Sums:
        return {} if hidden.routing is None else {"load": hidden.routing.load_E * weight}

    def _through(
        self, trainable: Tree, frozen: Flat, teacher: Tree | None, batch: Any, step: Array | int = 0
    ) -> tuple[transformer.HiddenOutput, tuple[Array, Sums]]:
        """Both models' hidden states, and the sums of the token losses over their heads, chunk by chunk."""
        hidden, trained, rest = self._student(trainable, frozen, batch)
        arrays, taught = {"targets": batch.targets, "mask": batch.mask}, None
        if isinstance(batch, TeacherBatch):
            arrays |= {"teacher_ids": batch.teacher_ids, "teacher_logprobs": batch.teacher_logprobs}
            rest["step"] = step
        elif teacher is not None and self.teacher_config:
            taught = jax.lax.stop_gradient(self._hidden(self.teacher_config, teacher, batch))
            arrays["teacher"] = taught.x_BTD
            name = _head_of(self.teacher_config)
            rest["teacher"] = {name: _gathered(self.teacher_config, teacher[name])}
            rest["step"] = step
        chunk, all_count = self.recipe.logits_chunk, self.all_count
        total, sums = chunked_sums(self._token_losses, trained, hidden.x_BTD, arrays, rest, chunk, all_count)
        distill = self.phase.distill
        if taught is not None and distill and distill.feature_loss:
            pairs = [(outputs, taught.outputs[name]) for name, outputs in hidden.outputs.items()]
            far = [feature_distance(distill.feature_loss, *pair, batch.mask) for pair in pairs]
            sums |= {"feature_loss": masked_sum(jnp.mean(jnp.stack(far), axis=0), batch.mask)}
            total += self._schedule(step)["feature_weight"] * sums["feature_loss"]
        return hidden, (total, sums)

    def _student(self, trainable: Tree, frozen: Flat, batch: Any) -> tuple[transformer.HiddenOutput, Tree, Tree]:
        """The model's hidden states; what of its head is trained, and what is frozen."""
        params = self._quantized(combine(self._rounded(trainable["params"]), frozen))
        bias = trainable.get("router_bias")
        hidden = self._hidden(
            self.config, params, batch, trainable["adapters"] or None, self.recipe.remat, bias, self.whole_groups
        )
        name = _head_of(self.config)
        head = {name: _gathered(self.config, params[name])}
        trained: Tree = {"params": {}, "adapters": {}}
        rest: Tree = {"head": {}}
        (trained["params"] if name in trainable["params"] else rest["head"]).update(head)
        if adapter := trainable["adapters"].get(name):
            trained["adapters"][name] = dataclasses.replace(adapter, key=None)  # nothing differentiates a key
            if adapter.key is not None:
                rest["key"] = adapter.key
        return hidden, trained, rest

    def _logits(self, trained: Tree, chunk: dict[str, Array], rest: Tree) -> Array:
        """The model's logits of a chunk of tokens."""
        adapters = trained["adapters"]
        if "key" in rest:  # each chunk drops other elements
            key = jax.random.fold_in(rest["key"], chunk["number"])
            adapters = {name: dataclasses.replace(adapter, key=key) for name, adapter in adapters.items()}
        return transformer.logits(self.config, trained["params"] | rest["head"], chunk["hidden"], adapters)

    def _token_losses(self, trained: Tree, chunk: dict[str, Array], rest: Tree) -> tuple[Array, Sums]:
        """(sum to differentiate, its parts) of a chunk of tokens."""
        distill, logits = self.phase.distill, self._logits(trained, chunk, rest)
        total = entropy = masked_sum(-token_logprobs(logits, chunk["targets"]), chunk["mask"])
        sums = {"cross_entropy": entropy}
        if distill and self.teacher_config and "step" in rest:
            now = self._schedule(rest["step"])
            options = now["temperature"], distill.skew
            if "teacher_ids" in chunk:
                known = chunk["teacher_ids"], chunk["teacher_logprobs"]
                kl = top_k_divergence(distill.divergence, logits, *known, *options)
            else:
                of_teacher = transformer.logits(self.teacher_config, rest["teacher"], chunk["teacher"], {})
                kl = divergence(distill.divergence, logits, of_teacher, *options)
            sums["kl"] = masked_sum(kl, chunk["mask"])
            total = now["kl_weight"] * sums["kl"] + now["ce_weight"] * entropy
        return total, sums

    def _schedule(self, step: Array | int) -> dict[str, Array | float]:
        """The weights and the temperature of distillation at a step: constants unless they have a final value."""
        distill, share = self.phase.distill, step / max(self.phase.steps - 1, 1)
        assert distill
        pairs = {name: (getattr(distill, name), getattr(distill, f"final_{name}")) for name in SCHEDULED}
        return {
            name: first if last is None else first + (last - first) * jnp.minimum(share, 1.0)
            for name, (first, last) in pairs.items()
        }

    def router_bias(self, state: TrainState) -> Tree:
        """{"router_bias": (L, E)} at a state's step, beside what is trained; nothing without one."""
        if state.router_bias is None:
            return {}
        end = max(self.phase.router_bias_until * self.phase.steps, 1)
        left = jnp.clip(2 * (1 - (state.step - state.skipped) / end), 0, 1)
        return {"router_bias": state.router_bias * left}

    def _hidden(
        self,
        config: ModelConfig,
        params: Tree,
        batch: Any,
        adapters: Tree | None = None,
        remat: bool = False,
        router_bias_LE: Array | None = None,
        whole_groups: bool = False,
    ) -> transformer.HiddenOutput:
        distill = self.phase.distill
        return transformer.hidden_states(
            config,
            params,
            batch.inputs,
            adapters=adapters,
            positions=batch.positions,
            segments=batch.segments,
            remat=remat,
            router_bias_LE=router_bias_LE,
            whole_groups=whole_groups,
            keep=distill.feature_of if distill and distill.feature_loss else (),
        )

    def _quantized(self, params: Tree) -> Tree:
        """The parameters as the model computes with them: linear maps as FP8 will hold them, if the recipe says so."""
        if self.recipe.quantize != "fp8":
            return params
        specs = leaves(declare(self.config))
        return map_with_path(lambda path, leaf: FakeQuantized(leaf) if is_quantized(specs[path]) else leaf, params)

    def _rounded(self, params: Flat) -> Flat:
        """Master weights in the dtype of computation, routers excepted: bfloat16 ties would change the experts."""
        dtype = jnp.dtype(self.recipe.dtype)

        def rounded(path: tuple[Any, ...], array: Array) -> Array:
            return array if is_router(path) else array.astype(dtype)

        return jax.tree_util.tree_map_with_path(rounded, params)


def _head_of(config: ModelConfig) -> str:
    return "embed" if config.tied else "head"


def _gathered(config: ModelConfig, weight: Array) -> Array:
    """The head as its chunks use it: gathered once, before them, but for what the tensor axis cuts."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return weight
    cut = "tensor" if mesh.shape.get("tensor", 1) > 1 else None
    axes = declare(config)[_head_of(config)].axes
    return jax.lax.with_sharding_constraint(weight, PartitionSpec(*(cut if axis == "vocab" else None for axis in axes)))


def make_update(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    ties: RouterTies | None = None,
) -> Callable[[TrainState, Flat, Tree | None, Batch], tuple[TrainState, Sums]]:
    """Compiles (state, frozen, teacher, batch) → (next state, figures); the state's memory is used again.

    A step whose loss or gradient is not finite changes nothing but the counts of steps.

    Args:
        state: an example (arrays or their shapes with shardings), whose shardings the next states keep.
        ties: of experts whose biases go up and down together.
    """
    parts = objective.phase.data.gradient_accumulation_steps

    def gradient_of(state: TrainState, frozen: Flat, teacher: Tree | None, batch: Batch) -> tuple[Tree, Sums]:
        """The gradient of the whole batch's loss, and the loss with its parts; computed part by part."""
        whole, done = objective.weight(batch), state.step - state.skipped
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def of_part(part: Batch, number: Array | int) -> tuple[Tree, Sums]:
            share = objective.weight(part) / jnp.maximum(whole, 1.0)  # of the batch's loss

            def loss(trainable: Tree) -> tuple[Array, Sums]:
                adapters = lora.with_dropout(trainable["adapters"], jax.random.fold_in(key, number))
                model = trainable | {"adapters": adapters} | objective.router_bias(state)
                total, figures = objective.loss(model, frozen, teacher, part, done)
                return total * share, {"loss": total * share} | {name: value * share for name, value in figures.items()}

            gradient, figures = jax.grad(loss, has_aux=True)(state.trainable)
            return gradient, figures

        if parts == 1:
            return of_part(batch, 0)

        def cut(rows: Array) -> Array:  # so that every device's own rows are spread over all parts
            return jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0)

        def step(total: Any, numbered: tuple[Batch, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of_part(*numbered)), None

        numbered = jax.tree.map(cut, batch), jnp.arange(parts)
        shape = jax.eval_shape(of_part, jax.tree.map(lambda rows: rows[0], numbered[0]), 0)
        return jax.lax.scan(step, jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shape), numbered)[0]

    def update(state: TrainState, frozen: Flat, teacher: Tree | None, batch: Batch) -> tuple[TrainState, Sums]:
        gradient, figures = gradient_of(state, frozen, teacher, batch)
        norm = optax.global_norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(figures["loss"])
        updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.trainable)
        load_LE, bias_LE = figures.pop("load", None), state.router_bias
        if bias_LE is not None and load_LE is not None:  # up where the load is below its share (arXiv 2408.15664)
            up_LE = jnp.sign(load_LE.mean(-1, keepdims=True) - load_LE)
            up_LE = ties.mean(up_LE[:, None])[:, 0] if ties else up_LE
            bias_LE += objective.phase.router_bias_rate * up_LE
        after = optax.apply_updates(state.trainable, updates), optimizer_state, bias_LE
        before = state.trainable, state.optimizer_state, state.router_bias
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
        figures |= {
            "gradient_norm": norm,
            "learning_rate": schedule(state.step - state.skipped),
            "tokens": jnp.sum(batch.mask > 0),
            "skipped": ~finite,
        }
        skipped = state.skipped + ~finite
        return TrainState(state.step + 1, skipped, state.key, *kept), figures

    shardings = jax.tree.map(lambda array: array.sharding, state)
    platform = next(iter(shardings.step.device_set)).platform
    options = compiler_options(platform)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
