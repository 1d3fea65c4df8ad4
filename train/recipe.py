"""Recipes: one YAML file says everything about a training run.

`read_recipe` takes the file (or the bare name of a shipped recipe), applies `key=value` overrides with dotted keys, and
validates the whole before any device is touched. The fields below are the only list of keys: `nemoe-train keys` prints
their descriptions, and the nearest of them is what an unknown key is answered with.
"""

import dataclasses
import difflib
import importlib.resources
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from nemoe_jax.config import ModelConfig
from nemoe_jax.errors import UserError
from nemoe_jax.tokenizer import Tokenizer

DType = Literal["float32", "bfloat16"]
FilePath = Annotated[Path, BeforeValidator(lambda value: Path(str(value)).expanduser() if value is not None else value)]
Globs = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class Section(BaseModel):
    """A mapping of a recipe: unknown keys are errors; numbers that YAML takes for text (`1e-3`) are read as numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class _Shape(Section):
    @model_validator(mode="after")
    def _possible(self) -> "_Shape":
        ModelConfig(**self.model_dump(), vocab=1)  # raises on what no model can have
        return self


def _shape_keys() -> dict[str, Any]:
    """ModelConfig's fields, but for those that the tokenizer and the recipe decide."""
    decided = ("vocab", "dtype", "bos_token_id", "eos_token_id")
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(ModelConfig):
        required = field.default is dataclasses.MISSING
        default = "mistral" if field.name == "family" else ... if required else field.default
        if field.name not in decided:
            keys[field.name] = (field.type, Field(default, description=field.metadata["help"]))
    return keys


Scratch = create_model("Scratch", __base__=_Shape, __doc__="The shape of a new model.", **_shape_keys())


class LoraTarget(Section):
    """One line of LoRA targets; the first pattern that matches a weight decides."""

    pattern: str = Field(description="glob over the parameter paths, such as blocks/*/attn/*")
    rank: int = Field(16, gt=0, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="the adapters' output is scaled by alpha / rank")


class Distill(Section):
    """Distillation: loss = kl_weight · KL(teacher ‖ student) + ce_weight · cross-entropy."""

    teacher: FilePath = Field(description="model directory of the teacher; it shares the student's vocabulary")
    kl_weight: float = Field(1.0, gt=0, description="weight of the forward KL on logits at temperature 1, per token")
    ce_weight: float = Field(0.0, ge=0, description="weight of the cross-entropy to the text, per token")


class Data(Section):
    """The text: UTF-8 files (one document each) and JSON Lines (one {"text": …} document a line)."""

    train: Globs = Field(min_length=1, description="files, globs (** descends) or directories of .txt and .jsonl files")
    held_out: Globs = Field([], description="the same, for evaluation; files named here are left out of train")
    sequence_length: int = Field(gt=0, description="tokens predicted per window")
    batch_size: int = Field(gt=0, description="windows per step, over all devices")
    separate_documents: bool = Field(
        False, description="whether attention and loss stop at the documents' ends inside a window"
    )


class Optimizer(Section):
    """AdamW with a warm-up and a schedule."""

    learning_rate: float = Field(gt=0, description="peak learning rate")
    warmup_steps: int = Field(0, ge=0, description="steps of linear rise to the peak")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="fall after the warm-up")
    final_fraction: float = Field(0.0, ge=0, le=1, description="learning rate at the last step, as a share of the peak")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay; never on norms")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's mean")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the squared gradient's mean")
    clip_norm: float = Field(1.0, gt=0, description="largest global norm of the gradient")
    router_learning_rate_scale: float = Field(
        1.0,
        ge=0,
        description="factor on the routers' learning rate, on top of min(1, RMS of the layer's router × "
        "√hidden): a carved router is so small that full Adam steps would wipe it out",
    )


class Recipe(Section):
    """A training run."""

    output: FilePath = Field(description="directory to create: the trained model, train_log.jsonl and report.json")
    model: FilePath | None = Field(None, description="model directory to start from (or else: scratch)")
    scratch: Scratch | None = Field(  # type: ignore[valid-type]
        None, description="shape of a new model to initialise (or else: model)"
    )
    tokenizer: FilePath | None = Field(None, description="tokenizer file or directory; default: the model's own")
    trainable: Literal["lora", "all"] = Field("lora", description="what learns: adapters alone, or every weight")
    lora: list[LoraTarget] = Field([], description="adapters, for trainable: lora")
    train_router: bool = Field(False, description="with adapters, whether the routers themselves learn as well")
    distill: Distill | None = Field(None, description="a teacher to match; default: plain cross-entropy")
    data: Data = Field(description="text")
    optimizer: Optimizer = Field(description="AdamW")
    steps: int = Field(gt=0, description="optimizer steps")
    balance_loss_weight: float = Field(0.0, ge=0, description="weight of the experts' load-balancing loss")
    z_loss_weight: float = Field(0.0, ge=0, description="weight of the squared log-partition of the router's logits")
    eval_every: int = Field(0, ge=0, description="steps between held-out evaluations; 0: only before and after")
    eval_batches: int = Field(16, gt=0, description="batches per held-out evaluation, evenly spaced over the text")
    log_every: int = Field(1, gt=0, description="steps between lines of train_log.jsonl")
    seed: int = Field(0, ge=0, description="seed of the initialisation and of the order of the text")
    dtype: DType = Field("float32", description="dtype of computation and of frozen weights; what learns is float32")
    save_dtype: DType | None = Field(None, description="dtype of the saved weights; default: dtype")
    remat: bool = Field(False, description="recompute each block in the backward pass: less memory, a third more time")
    mesh: str | None = Field(None, description="device mesh, such as fsdp=4,expert=2; default: one device")

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        wrong = None
        if (self.model is None) == (self.scratch is None):
            wrong = "wanted exactly one of model (a directory) and scratch (a shape)"
        elif self.scratch and self.tokenizer is None:
            wrong = "tokenizer: wanted with scratch, to give the vocabulary"
        elif self.scratch and self.trainable == "lora":
            wrong = "trainable: lora needs a model to adapt; a scratch run wants trainable: all"
        elif self.trainable == "lora" and not self.lora:
            wrong = "lora: wanted at least one {pattern, rank, alpha} for trainable: lora"
        elif self.trainable == "all" and self.lora:
            wrong = "lora: came with trainable: all, which wants none"
        elif self.optimizer.warmup_steps > self.steps:
            wrong = f"optimizer.warmup_steps: wanted at most steps ({self.steps}), got {self.optimizer.warmup_steps}"
        if wrong:
            raise ValueError(wrong)
        return self

    def scratch_config(self, tokenizer: Tokenizer) -> ModelConfig:
        """The config of a new model; vocabulary and special tokens are the tokenizer's."""
        shape: Section | None = self.scratch
        if shape is None:
            raise UserError("scratch: missing")
        return ModelConfig(
            **shape.model_dump(),
            vocab=tokenizer.vocab_size,
            dtype=self.save_dtype or self.dtype,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
        )


def shipped_recipes() -> dict[str, str]:
    """Name → text of the recipes that come with the package."""
    files = {file.name: file for file in importlib.resources.files("train").joinpath("recipes").iterdir()}
    return {name.removesuffix(".yaml"): files[name].read_text("utf-8") for name in sorted(files)}


def read_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and validates a recipe.

    Args:
        name: a YAML file, or the name of a shipped recipe with or without `.yaml`.
        overrides: `dotted.key=value`, the value in YAML; `lora.0.rank=8` reaches into lists.
    Raises:
        UserError: no such file, not a mapping, unknown key (with the nearest known one), bad or missing value.
    """
    path, shipped = Path(name), shipped_recipes()
    if path.is_file():
        text = path.read_text("utf-8")
    elif str(name).removesuffix(".yaml") in shipped:
        text = shipped[str(name).removesuffix(".yaml")]
    else:
        raise UserError(f"{name}: no such recipe file, and the shipped recipes are {', '.join(shipped)}")
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{name}: wanted a mapping of keys, got {type(tree).__name__}")
    overridden = [_override(tree, override) for override in overrides]
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        complaints = [_explain(detail, overridden) for detail in error.errors()]
        raise UserError(f"{name}: " + "; ".join(complaints)) from error


def list_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key with its field, depth first; the items of a list are written `lora.N.rank`."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if inner := _inner_section(field):
            yield from list_keys(inner, f"{prefix}{name}.{'N.' if typing.get_origin(field.annotation) is list else ''}")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, defaults included, as YAML that `read_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _inner_section(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds: `Section`, `Section | None` or `list[Section]`."""
    for candidate in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _override(tree: dict[str, Any], override: str) -> str:
    """Sets one `dotted.key=value` in the tree and returns the key."""
    key, equals, text = override.partition("=")
    if not (equals and key):
        raise UserError(f"wanted key=value after the recipe, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{key}: not a YAML value: {text!r}") from error
    _assign(tree, key.split("."), value, key)
    return key


def _assign(node: Any, names: list[str], value: Any, key: str) -> None:
    """`node[names[0]][names[1]]… = value`, through mappings (made where missing) and lists."""
    name, *rest = names
    place: Any = name
    if isinstance(node, list):
        if not (name.isdecimal() and int(name) < len(node)):
            raise UserError(f"{key}: wanted an index below {len(node)}, got {name!r}")
        place = int(name)
    elif not isinstance(node, dict):
        raise UserError(f"{key}: wanted a mapping that holds {name}, got the value {node!r}")
    elif rest and node.get(name) is None:
        node[name] = {}
    if rest:
        _assign(node[place], rest, value, key)
    else:
        node[place] = value


def _explain(detail: Any, overridden: Sequence[str]) -> str:
    """One of pydantic's errors as `key: wanted …, got …`."""
    key = ".".join(str(part) for part in detail["loc"])
    origin = " (from the command line)" if any(f"{key}.".startswith(f"{name}.") for name in overridden) else ""
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key{origin}; the nearest known key is {_nearest(key)}"
    if detail["type"] == "missing":
        parts = ".".join("N" if isinstance(part, int) else str(part) for part in detail["loc"])
        return f"{key}: missing; wanted {dict(list_keys())[parts].description}"
    message = detail["msg"].removeprefix("Value error, ")
    if not key:
        return message
    wanted = message.replace("Input should be", "wanted").replace(", unable to parse string as a number", "")
    wanted = wanted.replace(", unable to parse string as an integer", "")
    return f"{key}: {wanted}, got {detail['input']!r}{origin}"


def _nearest(key: str) -> str:
    """The known key most like this one: by its last name, and then by its place."""
    parent, _, name = key.rpartition(".")

    def likeness(known: str) -> float:
        known_parent, _, known_name = known.rpartition(".")
        same_place = known_parent.replace(".N", "") == "".join(c for c in parent if not c.isdigit()).rstrip(".")
        return difflib.SequenceMatcher(None, name, known_name).ratio() + 0.1 * same_place

    return max((known for known, _ in list_keys()), key=likeness)
