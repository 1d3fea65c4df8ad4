"""From a recipe to what the loop needs: everything checked first, then the weights, laid out on the devices."""

import dataclasses
import fnmatch
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemoe_jax.adapters import lora, peft_load
from nemoe_jax.checkpoints import pretrained, reader
from nemoe_jax.checkpoints.gguf.directory import model_directory
from nemoe_jax.errors import UserError
from nemoe_jax.spec import schema, sharding
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.fp8_weight import Quantization, abstract_weight
from nemoe_jax.spec.mesh import make_mesh, parse_mesh
from nemoe_jax.spec.router_ties import RouterTies, find_ties
from nemoe_jax.spec.schema import Tree, leaves
from nemoe_jax.text.tokenizers.load import Tokenizer, load_tokenizer
from train.recipe import Phase, Recipe
from train.recipe.run import QUANTIZED_BASES
from train.step.chosen_experts import ChosenExperts, Places, own_sharding, take_experts
from train.step.optimizer import router_scale
from train.step.step import Flat, split


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a recipe names, found and read as far as that costs nothing."""

    config: ModelConfig
    teachers: list[ModelConfig | None]  # of each phase
    targets: list[list[lora.Target]]  # likewise
    tokenizer: Tokenizer
    tokenizer_path: Path


def resolve(recipe: Recipe) -> Inputs:
    """Finds what the recipe names, and what is wrong with it, as far as can be known without devices and weights.

    Raises:
        UserError: naming the recipe's key, what was expected and what came.
    """
    if recipe.output.exists():
        raise UserError(f"output: {recipe.output} already exists")
    tokenizer_path = recipe.tokenizer or recipe.model
    if tokenizer_path is None:
        raise UserError("tokenizer: missing")
    tokenizer_path = model_directory(tokenizer_path)
    tokenizer = load_tokenizer(tokenizer_path)
    config = reader.read_config(recipe.model) if recipe.model else recipe.scratch_config(tokenizer)
    if tokenizer.vocab_size > config.vocab:
        raise UserError(f"tokenizer: expected at most the model's {config.vocab} tokens, got {tokenizer.vocab_size}")
    teachers = [reader.read_config(phase.distill.teacher) if phase.distill else None for phase in recipe.phases]
    for phase, teacher in zip(recipe.phases, teachers, strict=True):
        check_fit(recipe, phase, config, teacher)
    targets = [targets_of(phase, config) for phase in recipe.phases]
    return Inputs(config, teachers, targets, tokenizer, tokenizer_path)


def check_fit(recipe: Recipe, phase: Phase, config: ModelConfig, teacher: ModelConfig | None) -> None:
    """Raises UserError where a phase, the model, its teacher and the mesh do not fit together."""
    if teacher and phase.distill and teacher.vocab != config.vocab:
        raise UserError(
            f"distill.teacher: {phase.distill.teacher}: expected the model's vocabulary of {config.vocab}, "
            f"got {teacher.vocab}"
        )
    if teacher and phase.distill and phase.distill.feature_loss:
        for size in ("hidden", "layers"):
            if (ours := getattr(config, size)) != (theirs := getattr(teacher, size)):
                raise UserError(
                    f"distill.feature_loss: {phase.distill.teacher}: expected {size} {ours}, the model's, got {theirs}"
                )
    for name, model in (("model", config), ("teacher", teacher)):
        if model and phase.data.sequence_length > model.context:
            raise UserError(
                f"data.sequence_length: expected at most the {name}'s context of {model.context} tokens, "
                f"got {phase.data.sequence_length}"
            )
    paths = leaves(schema.declare(config))
    for pattern in phase.weights:
        if not fnmatch.filter(paths, pattern):
            raise UserError(f"weights: {pattern} matches no weight; the weights are: {', '.join(paths)}")
    of_experts = {
        "train_router": phase.train_router,
        "trainable: router": phase.trainable == "router",
        "trainable: esft": phase.trainable == "esft",
        "router_bias_rate": phase.router_bias_rate > 0,
    }
    for key, wanted in of_experts.items():
        if wanted and not config.experts:
            raise UserError(f"{key}: expected an MoE model, got the dense {recipe.model}")
    if recipe.mesh and recipe.mesh != "auto":
        sizes = parse_mesh(recipe.mesh)
        for model in filter(None, (config, teacher)):
            sharding.check(model, sizes, phase.data.microbatch_size, phase.data.sequence_length)


def targets_of(phase: Phase, config: ModelConfig) -> list[lora.Target]:
    """The LoRA targets of a phase, found to match the model; a PEFT adapter brings its own."""
    if phase.adapter:
        return peft_load.read_targets(phase.adapter, config)
    targets = [lora.Target(**target.model_dump()) for target in phase.lora]
    lora.match(config, targets)
    return targets


def recipe_mesh(recipe: Recipe, config: ModelConfig, devices: Any = None) -> Mesh | None:
    """The recipe's mesh over the devices (all of them by default); None for the first device alone."""
    if recipe.mesh is None:
        if jax.process_count() > 1:
            raise UserError("mesh: expected over several processes; for example mesh=auto")
        return None
    devices = jax.devices() if devices is None else devices
    if recipe.mesh != "auto":
        return make_mesh(parse_mesh(recipe.mesh), devices)
    data = [phase.data for phase in recipe.phases]
    rows = int(np.gcd.reduce([part.microbatch_size for part in data]))
    from train.run.auto_mesh import auto_mesh

    return make_mesh(auto_mesh(config, len(devices), rows, max(part.sequence_length for part in data)), devices)


def trains(phase: Phase, path: str) -> bool:
    """Whether the weight of that path itself learns, beside adapters."""
    routers = phase.train_router or phase.trainable == "router"
    named = any(fnmatch.fnmatchcase(path, pattern) for pattern in phase.weights)
    return phase.trainable == "all" or named or (routers and path.endswith("/router"))


def expert_paths(config: ModelConfig) -> list[str]:
    """The experts' own weights."""
    return [path for path, spec in leaves(schema.declare(config)).items() if "experts" in spec.stacked]


def trains_all(recipe: Recipe) -> bool:
    """Whether a phase trains every weight, or named ones."""
    return any(phase.trainable in ("weights", "all") for phase in recipe.phases)


def frozen_quantization(recipe: Recipe) -> Quantization | None:
    """What the linear maps lie in, which no phase of such a recipe trains themselves."""
    return QUANTIZED_BASES.get(recipe.quantize)


def load(recipe: Recipe, config: ModelConfig, mesh: Mesh | None) -> Tree:
    """The model's parameters, each array on its devices.

    In float32 where a phase trains every weight, else in the recipe's dtype, or linear maps in FP8 or NF4.
    """
    if recipe.model is None:
        key = jax.random.key(recipe.phases[0].seed)
        return schema.initialize(config, key, jnp.float32, sharding.shardings(config, mesh))
    return pretrained.load_pretrained(
        recipe.model,
        mesh=mesh,
        dtype="float32" if trains_all(recipe) else recipe.dtype,
        quantization=frozen_quantization(recipe),
        progress=True,
    )[1]


def trainable_of(
    recipe: Recipe,
    phase: Phase,
    config: ModelConfig,
    targets: list[lora.Target],
    params: Tree,
    mesh: Mesh | None,
    places: Places = (),
) -> tuple[Tree, Flat]:
    """What a phase trains, {"params": …, "adapters": …}, and the frozen rest of the model.

    Args:
        places: the experts that learn, with `trainable: esft`.
    """
    spent = phase.trainable == "all" and phase.tolerance is None  # nobody asks for the weights before the phase again
    trained, frozen = split(params, lambda path: trains(phase, path), recipe.dtype, copy=not spent)
    trained |= {path: take_experts(frozen[path], places) for path in expert_paths(config) if places}
    if phase.adapter:
        adapters = peft_load.load_adapters(phase.adapter, config, mesh)[1]
    else:
        adapters = lora.initialize(config, targets, jax.random.key(phase.seed), lora.shardings(config, targets, mesh))
    return {"params": trained, "adapters": adapters}, frozen


def abstract_trainable(
    recipe: Recipe, phase: Phase, config: ModelConfig, targets: list[lora.Target], mesh: Mesh | None
) -> tuple[Tree, Flat]:
    """The shapes and shardings of `trainable_of`, with no array made."""
    trained: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    places = leaves(sharding.shardings(config, mesh))
    for path, spec in leaves(schema.declare(config)).items():
        into, dtype = (trained, "float32") if trains(phase, path) else (frozen, recipe.dtype)
        into[path] = abstract_weight(spec, places[path], dtype, frozen_quantization(recipe))
    if phase.esft_share:  # the fewest experts with that share are at most so many
        most = math.ceil(phase.esft_share * config.experts)
        for path in expert_paths(config):
            layers, _, *shape = frozen[path].shape
            places_S = tuple((layer, expert) for layer in range(layers) for expert in range(most))
            values = jax.ShapeDtypeStruct((len(places_S), *shape), jnp.float32, sharding=own_sharding(frozen[path]))
            trained[path] = ChosenExperts(values, places_S)
    adapters = jax.tree.map(
        lambda array, place: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place),
        lora.abstract(config, targets),
        lora.shardings(config, targets, mesh),
    )
    return {"params": trained, "adapters": adapters}, frozen


def bias_shape(phase: Phase, config: ModelConfig) -> tuple[int, int] | None:
    """(L, E) of the routers' biases; None where a phase has none."""
    return (config.layers - config.dense_layers, config.experts) if phase.router_bias_rate else None


def routers_scale(phase: Phase, params: Tree, mesh: Mesh | None) -> np.ndarray | None:
    """The learning-rate factor of each layer's router."""
    router_LDE = _router(params, mesh)
    scale = phase.optimizer.router_learning_rate_scale
    return None if router_LDE is None else np.asarray(jax.jit(router_scale, static_argnums=1)(router_LDE, scale))


def router_ties(phase: Phase, config: ModelConfig, params: Tree, mesh: Mesh | None) -> RouterTies | None:
    """Which rows of the routers stay alike; None where none do."""
    router_LDE = _router(params, mesh) if phase.tie_router_rows else None
    return None if router_LDE is None else find_ties(router_LDE, config.top_k)


def _router(params: Tree, mesh: Mesh | None) -> np.ndarray | None:
    """The routers of all MoE layers, in float32 on this host; a model has at most one group of such layers."""
    everywhere = NamedSharding(mesh, PartitionSpec()) if mesh else None
    for path, router_LDE in leaves(params).items():
        if path.endswith("/router"):
            return np.asarray(jax.jit(lambda array: array.astype(jnp.float32), out_shardings=everywhere)(router_LDE))
    return None
