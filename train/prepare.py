"""From a recipe to what the loop needs: everything checked first, then the weights, laid out on the devices."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from nemoe_jax import checkpoint, hf, lora, schema, sharding
from nemoe_jax.config import ModelConfig
from nemoe_jax.errors import UserError
from nemoe_jax.schema import ParamSpec, Tree
from nemoe_jax.text import find_files
from nemoe_jax.tokenizer import Tokenizer, load_tokenizer
from train.recipe import Recipe
from train.step import Flat, split


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a recipe names, found and read as far as that costs nothing."""

    config: ModelConfig
    teacher_config: ModelConfig | None
    tokenizer: Tokenizer
    tokenizer_path: Path
    targets: list[lora.Target]
    train_files: list[Path]
    held_out_files: list[Path]
    mesh_sizes: dict[str, int] | None


def check(recipe: Recipe) -> Inputs:
    """Finds what the recipe names, and what is wrong with it, as far as can be known without devices and weights.

    Raises:
        UserError: naming the recipe's key, what was wanted and what came.
    """
    if recipe.output.exists():
        raise UserError(f"output: {recipe.output} already exists")
    mesh_sizes = sharding.parse_mesh(recipe.mesh) if recipe.mesh else None
    held_out_files = find_files(recipe.data.held_out) if recipe.data.held_out else []
    train_files = find_files(recipe.data.train, exclude=held_out_files)
    tokenizer_path = recipe.tokenizer or recipe.model
    if tokenizer_path is None:
        raise UserError("tokenizer: missing")
    tokenizer = load_tokenizer(tokenizer_path)
    config = checkpoint.read_config(recipe.model) if recipe.model else recipe.scratch_config(tokenizer)
    teacher_config = checkpoint.read_config(recipe.distill.teacher) if recipe.distill else None
    _check_fit(recipe, config, teacher_config, tokenizer)
    targets = [lora.Target(target.pattern, target.rank, target.alpha) for target in recipe.lora]
    lora.match(config, targets)
    return Inputs(config, teacher_config, tokenizer, tokenizer_path, targets, train_files, held_out_files, mesh_sizes)


def _check_fit(recipe: Recipe, config: ModelConfig, teacher: ModelConfig | None, tokenizer: Tokenizer) -> None:
    """Whether text, model and teacher fit together."""
    if tokenizer.vocab_size > config.vocab:
        raise UserError(f"tokenizer: wanted at most the model's {config.vocab} tokens, got {tokenizer.vocab_size}")
    if recipe.distill and teacher and teacher.vocab != config.vocab:
        raise UserError(
            f"distill.teacher: {recipe.distill.teacher}: wanted the model's vocabulary of {config.vocab}, "
            f"got {teacher.vocab}"
        )
    if recipe.data.separate_documents and tokenizer.eos_id is None:
        raise UserError(f"data.separate_documents: the tokenizer {tokenizer.path} has no end-of-sequence token")
    if recipe.data.sequence_length > config.context:
        raise UserError(
            f"data.sequence_length: wanted at most the model's context of {config.context} tokens, "
            f"got {recipe.data.sequence_length}"
        )
    if recipe.train_router and not config.experts:
        raise UserError(f"train_router: wanted a mixture of experts, got the dense {recipe.model}")


def load(recipe: Recipe, inputs: Inputs, mesh: Mesh | None) -> tuple[Tree, Flat]:
    """The trained tree {"params": …, "adapters": …} and the frozen rest of the model, each array on its devices."""
    config, key = inputs.config, jax.random.key(recipe.seed)
    if recipe.model is None:
        params = schema.initialise(config, key, jnp.float32, sharding.shardings(config, mesh))
    else:
        dtype = "float32" if recipe.trainable == "all" else recipe.dtype
        params = hf.load(recipe.model, mesh=mesh, dtype=dtype, progress=True)[1]

    def trains(path: str) -> bool:
        return recipe.trainable == "all" or (recipe.train_router and path.endswith("/router"))

    trained, frozen = split(params, trains)
    adapters = lora.initialise(config, inputs.targets, key)
    return {"params": trained, "adapters": jax.device_put(adapters, _adapter_shardings(inputs, mesh))}, frozen


def _adapter_shardings(inputs: Inputs, mesh: Mesh | None) -> Tree:
    """Where A and B live: each axis as in the adapted weight, the rank on every device."""

    def place(spec: ParamSpec, target: lora.Target) -> lora.Adapter:
        if mesh is None:
            return lora.Adapter(one_device, one_device, target.alpha / target.rank)
        inputs_end = len(spec.stacked) + len(spec.contracted)
        a = dataclasses.replace(spec, produced=("rank",), shape=(*spec.shape[:inputs_end], target.rank))
        b = dataclasses.replace(
            spec, contracted=("rank",), shape=(*spec.shape[: len(spec.stacked)], target.rank, *spec.shape[inputs_end:])
        )
        place_a, place_b = (NamedSharding(mesh, sharding.partition_spec(part, mesh.shape)) for part in (a, b))
        return lora.Adapter(place_a, place_b, target.alpha / target.rank)

    one_device = SingleDeviceSharding(jax.local_devices()[0])
    matched = lora.match(inputs.config, inputs.targets)
    return schema.unflatten({path: place(spec, target) for path, (spec, target) in matched.items()})
