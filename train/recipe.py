"""Recipes: one YAML file says everything about a training run.

`read_recipe` takes the file (or the bare name of a shipped recipe), applies `key=value` overrides with dotted keys, and
validates the whole before any device is touched. The fields below are the only list of keys: `nemoe-train keys` prints
their descriptions, and the nearest of them is what an unknown key is answered with.

A run is a list of phases, each on the result of the last accepted one. The keys of a phase may stand at the top of the
file, where they hold for every phase that does not say otherwise; a file without `phases` is a run of one.
"""

import dataclasses
import difflib
import importlib.resources
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.text.data.formats import KEYS
from nemoe_jax.text.tokenizers.load import Tokenizer

DType = Literal["float32", "bfloat16"]
Divergence = Literal["forward", "reverse", "skew-forward", "skew-reverse"]
FilePath = Annotated[Path, BeforeValidator(lambda value: Path(str(value)).expanduser() if value is not None else value)]
Globs = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Tree = dict[str, Any]
FORMER_KEYS = {"accumulation": "gradient_accumulation_steps"}  # which go on working for this release


def _sources(value: Any) -> Any:
    """A path or a single source stands for a list of one; a path in the list for a source of that file."""
    values = value if isinstance(value, list) else [value]
    return [{"files": [item]} if isinstance(item, str) else item for item in values]


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
    rslora: bool = Field(False, description="scale by alpha / √rank instead (rank-stabilized LoRA)")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the adapters' inputs that is dropped in training")


class Distill(Section):
    """Distillation: loss = kl_weight · divergence of teacher and student + ce_weight · cross-entropy.

    What has a final value goes there in a straight line, from the first step to the last.
    """

    teacher: FilePath = Field(description="model directory of the teacher; it shares the student's vocabulary")
    kl_weight: float = Field(1.0, gt=0, description="weight of the divergence on logits, per token")
    final_kl_weight: float | None = Field(None, ge=0, description="the same at the last step; default: kl_weight")
    ce_weight: float = Field(0.0, ge=0, description="weight of the cross-entropy to the text, per token")
    final_ce_weight: float | None = Field(None, ge=0, description="the same at the last step; default: ce_weight")
    divergence: Divergence = Field(
        "forward", description="KL(teacher ‖ student), the reverse, or either against a mixture of both"
    )
    skew: float = Field(0.1, gt=0, lt=1, description="of the skewed divergences: the share of the first distribution")
    temperature: float = Field(1.0, gt=0, description="divides the logits of both; the divergence is times its square")
    final_temperature: float | None = Field(None, gt=0, description="the same at the last step; default: temperature")
    offline: FilePath | None = Field(
        None, description="directory of the teacher's predictions, from nemoe-train cache-teacher: no teacher in memory"
    )
    top_k: int = Field(64, gt=0, description="of offline: the teacher's likeliest tokens that are kept of each target")

    @model_validator(mode="after")
    def _constant(self) -> "Distill":
        if self.offline and self.final_temperature is not None:
            raise ValueError("final_temperature: expected none with offline, which is of one temperature")
        return self


class Preference(Section):
    """Training on pairs of responses to a prompt, of which one is preferred; see train/step/preference_loss.py."""

    loss: Literal["dpo", "ipo", "orpo", "kto", "rpo"] = Field(
        description="loss on a pair; rpo needs scores in the data"
    )
    beta: float = Field(0.1, gt=0, description="how far the model may go from the reference: the smaller, the farther")
    sft_weight: float = Field(0.0, ge=0, description="weight of the cross-entropy of the chosen responses, per token")
    reward_scale: float = Field(1.0, gt=0, description="of rpo: factor on the difference of the scores")
    desirable_weight: float = Field(1.0, ge=0, description="of kto: weight of the chosen responses")
    undesirable_weight: float = Field(1.0, ge=0, description="of kto: weight of the rejected responses")

    @property
    def has_reference(self) -> bool:
        """Whether the loss needs the log-probabilities that the model gave before the phase."""
        return self.loss != "orpo"


class Source(Section):
    """One source of documents: files, or a dataset of Hugging Face."""

    files: Globs = Field([], description="files, globs (** descends) or directories of .jsonl, .json, .parquet, .txt")
    dataset: str | None = Field(None, description="instead of files: name of a dataset on the hub, or its directory")
    subset: str | None = Field(None, description="the dataset's configuration")
    split: str = Field("train", description="the dataset's split")
    format: Literal["auto", *KEYS] = Field(  # type: ignore[valid-type]
        "auto", description="what a row looks like; auto goes by its keys"
    )
    weight: float | None = Field(None, gt=0, description="relative share of the training rows; default: by size")
    limit: int | None = Field(None, gt=0, description="documents to take at most, from the beginning")

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        if bool(self.files) == bool(self.dataset):
            raise ValueError("expected exactly one of files and dataset")
        return self


Sources = Annotated[list[Source], BeforeValidator(_sources)]


class Data(Section):
    """Text and chats, packed into rows: no attention and no target crosses a document's end."""

    train: Sources = Field(min_length=1, description="sources, or simply a path")
    held_out: Sources = Field([], description="the same, for evaluation; files named here are left out of train")
    sequence_length: int = Field(gt=0, description="tokens of a row")
    batch_size: int = Field(gt=0, description="rows per step, over all devices")
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="microbatches that a step's rows are computed in, one after another"
    )
    bad_rows: Literal["skip", "stop"] = Field("skip", description="whether a malformed row is left out or an error")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="share of malformed rows that stops the run")
    cache: FilePath | None = Field(None, description="where tokens are kept; default: ~/.cache/nemoe-jax")

    @property
    def microbatch_size(self) -> int:
        """Rows that are computed at once, over all devices."""
        return self.batch_size // self.gradient_accumulation_steps

    @model_validator(mode="after")
    def _whole_parts(self) -> "Data":
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"gradient_accumulation_steps: expected a divisor of batch_size {self.batch_size}, "
                f"got {self.gradient_accumulation_steps}"
            )
        return self


class Optimizer(Section):
    """AdamW or Muon with a warm-up and a schedule."""

    name: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: of what is trained itself, the matrices within the blocks by orthogonalized momentum, "
        "with steps as large as AdamW's; embedding, head, norms, routers and adapters by AdamW",
    )

    learning_rate: float = Field(gt=0, description="peak learning rate")
    warmup_steps: int = Field(0, ge=0, description="steps of linear rise to the peak")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine",
        description="fall after the warm-up; wsd: stable, then linear over the last decay_fraction of the steps",
    )
    decay_fraction: float = Field(0.2, gt=0, le=1, description="of wsd: share of the steps in which the rate falls")
    final_fraction: float = Field(0.0, ge=0, le=1, description="learning rate at the last step, as a share of the peak")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    no_decay: Globs = Field(["*norm"], description="globs over the parameter paths that have no weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's mean")
    momentum: float = Field(0.95, ge=0, lt=1, description="of muon: decay of the momentum")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the squared gradient's mean")
    clip_norm: float = Field(1.0, gt=0, description="largest global norm of the gradient")
    router_learning_rate_scale: float = Field(
        1.0,
        ge=0,
        description="factor on the routers' learning rate, on top of min(1, RMS of the layer's router × "
        "√hidden): a carved router is so small that full Adam steps would wipe it out",
    )


class Phase(Section):
    """One phase of a run."""

    name: str = Field("train", pattern=r"^[\w.-]+$", description="name in reports and of the adapter's directory")
    trainable: Literal["lora", "router", "weights", "all"] = Field(
        "lora",
        description="what learns: adapters (with train_router the routers, too), routers alone, the weights that match "
        "one of weights, every weight",
    )
    weights: Globs = Field(
        [], description="globs over the parameter paths, such as blocks/*/ffn/*, for trainable: weights"
    )
    lora: list[LoraTarget] = Field([], description="adapters, for trainable: lora")
    adapter: FilePath | None = Field(None, description="PEFT adapter to go on from, instead of lora: its targets")
    train_router: bool = Field(False, description="with adapters, whether the routers themselves learn as well")
    distill: Distill | None = Field(None, description="a teacher to match; default: plain cross-entropy")
    preference: Preference | None = Field(
        None, description="train on pairs of responses; the reference is the model as the phase begins"
    )
    data: Data = Field(description="text")
    optimizer: Optimizer = Field(description="AdamW or Muon")
    steps: int = Field(gt=0, description="optimizer steps")
    tolerance: float | None = Field(
        None,
        ge=0,
        description="acceptance test: rise of the held-out loss (nats) from which the phase is discarded and its "
        "adapter kept aside; default: none",
    )
    balance_loss_weight: float = Field(0.0, ge=0, description="weight of the experts' load-balancing loss")
    z_loss_weight: float = Field(0.0, ge=0, description="weight of the squared log-partition of the router's logits")
    select: Literal["last", "best"] = Field(
        "last", description="whether the phase ends with its last weights or with those of the lowest held-out loss"
    )
    eval_every: int = Field(0, ge=0, description="steps between held-out evaluations; 0: only before and after")
    eval_batches: int = Field(16, gt=0, description="batches per held-out evaluation, evenly spaced over the text")
    seed: int = Field(0, ge=0, description="seed of the initialization, of the order of the text and of dropout")

    @model_validator(mode="after")
    def _consistent(self) -> "Phase":
        wrong = None
        if self.trainable == "lora" and not (self.lora or self.adapter):
            wrong = "lora: expected at least one {pattern, rank, alpha} (or adapter: DIRECTORY) for trainable: lora"
        elif self.trainable != "lora" and (self.lora or self.adapter):
            wrong = f"{'lora' if self.lora else 'adapter'}: came with trainable: {self.trainable}, which wants none"
        elif (self.trainable == "weights") != bool(self.weights):
            wrong = f"weights: expected globs with trainable: weights alone, got {self.weights} with {self.trainable}"
        elif self.lora and self.adapter:
            wrong = "adapter: brings its own targets, but lora came as well"
        elif self.optimizer.warmup_steps > self.steps:
            wrong = f"optimizer.warmup_steps: expected at most steps ({self.steps}), got {self.optimizer.warmup_steps}"
        elif self.tolerance is not None and not self.data.held_out:
            wrong = "tolerance: expected data.held_out to judge by"
        elif self.select == "best" and not (self.data.held_out and self.eval_every):
            wrong = "select: best: expected data.held_out and eval_every to choose by"
        elif self.preference and self.distill:
            wrong = "preference: expected no distill beside it"
        if wrong:
            raise ValueError(wrong)
        return self


class Checkpoints(Section):
    """What is kept so that an interrupted run can go on."""

    every: int = Field(100, gt=0, description="steps between checkpoints of a phase; the last step always has one")
    keep: int = Field(2, gt=0, description="newest checkpoints to keep, beside the one of the best held-out loss")


class Recipe(Section):
    """A training run."""

    output: FilePath = Field(description="directory to create: the trained model with its log, report and adapters")
    model: FilePath | None = Field(None, description="model directory to start from (or else: scratch)")
    scratch: Scratch | None = Field(  # type: ignore[valid-type]
        None, description="shape of a new model to initialize (or else: model)"
    )
    tokenizer: FilePath | None = Field(None, description="tokenizer file or directory; default: the model's own")
    dtype: DType = Field("float32", description="dtype of computation and of frozen weights; what learns is float32")
    save_dtype: DType | None = Field(None, description="dtype of the saved weights; default: dtype")
    quantize: Literal["fp8"] | None = Field(
        None,
        description="fp8: the model is trained as FP8 will hold it, its linear maps rounded in every forward pass "
        "(quantization-aware); they lie in FP8 unless a phase trains all weights; default: not rounded",
    )
    remat: bool = Field(False, description="recompute each block in the backward pass: less memory, a third more time")
    logits_chunk: int = Field(1024, gt=0, description="tokens on a device whose logits are in memory at once")
    mesh: str | None = Field(None, description="device mesh, such as fsdp=4,expert=2, or auto; default: one device")
    checkpoints: Checkpoints = Field(Checkpoints(every=100, keep=2), description="checkpoints of the running training")
    max_skipped: int = Field(10, ge=0, description="steps in a row skipped for non-finite gradients before it stops")
    log_every: int = Field(1, gt=0, description="steps between lines of train_log.jsonl and TensorBoard")
    wandb: str | None = Field(None, description="project of Weights & Biases to log to as well, if it is installed")
    phases: list[Phase] = Field(min_length=1, description="the phases; keys that are not said here stand at the top")

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        wrong = None
        names = [phase.name for phase in self.phases]
        if (self.model is None) == (self.scratch is None):
            wrong = "expected exactly one of model (a directory) and scratch (a shape)"
        elif self.scratch and self.tokenizer is None:
            wrong = "tokenizer: expected with scratch, to give the vocabulary"
        elif self.scratch and self.phases[0].trainable != "all":
            wrong = f"trainable: {self.phases[0].trainable} needs a model; a scratch run wants trainable: all"
        elif len(set(names)) < len(names):
            wrong = f"phases: expected different names, got {', '.join(names)}"
        elif self.quantize and any(target.dropout for phase in self.phases for target in phase.lora):
            wrong = "lora.dropout: expected 0 with quantize, which rounds weights and adapter together"
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
    text = shipped.get(str(name).removesuffix(".yaml"))
    if not path.is_file() and text is None:
        raise UserError(f"{name}: no such recipe file, and the shipped recipes are {', '.join(shipped)}")
    try:
        tree = _apart(yaml.safe_load(path.read_bytes() if path.is_file() else text or "") or {})
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not
        raise UserError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{name}: expected a mapping of keys, got {type(tree).__name__}")
    tree = _renamed(tree, str(name))
    overridden = [_override(tree, override) for override in overrides]
    try:
        return Recipe.model_validate(_spread(tree))
    except ValidationError as error:
        complaints = dict.fromkeys(_explain(detail, tree, overridden) for detail in error.errors())
        raise UserError(f"{name}: " + "; ".join(complaints)) from error


def _apart(node: Any) -> Any:
    """The same tree without aliases (`*name`): what is set in one place stays as it is in the others."""
    if isinstance(node, dict):
        return {key: _apart(value) for key, value in node.items()}
    return [_apart(value) for value in node] if isinstance(node, list) else node


def _renamed(node: Any, origin: str) -> Any:
    """The same tree with keys by their present names; a former one is said on standard error."""
    if isinstance(node, list):
        return [_renamed(item, origin) for item in node]
    if not isinstance(node, dict):
        return node
    for former in FORMER_KEYS.keys() & node.keys():
        print(f"note: {origin}: {former} is now called {FORMER_KEYS[former]}", file=sys.stderr)
    return {FORMER_KEYS.get(key, key): _renamed(value, origin) for key, value in node.items()}


def _spread(tree: Tree) -> Tree:
    """The tree with every phase complete: what stands at the top holds for each phase that does not say otherwise."""
    shared = {key: value for key, value in tree.items() if key in Phase.model_fields}
    phases = tree.get("phases", [{}])
    if isinstance(phases, list):
        phases = [_merged(shared, phase) if isinstance(phase, dict) else phase for phase in phases]
    return {key: value for key, value in tree.items() if key not in shared} | {"phases": phases}


def _merged(under: Tree, over: Tree) -> Tree:
    """Both mappings, nested ones merged likewise; `over` wins."""
    both = {key: _merged(under[key], value) for key, value in over.items() if _both_mappings(under.get(key), value)}
    return under | over | both


def _both_mappings(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def list_keys() -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key with its field; the items of a list are written `lora.N.rank`. A phase's keys as at the top."""
    for key, field in _keys_of(Recipe):
        if not key.startswith("phases."):
            yield key, field
    yield from _keys_of(Phase)


def _keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if inner := _inner_section(field):
            yield from _keys_of(inner, f"{prefix}{name}.{'N.' if typing.get_origin(field.annotation) is list else ''}")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, defaults included, as YAML that `read_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _inner_section(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds: `Section`, `Section | None` or `list[Section]`."""
    for candidate in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _override(tree: Tree, override: str) -> str:
    """Sets one `dotted.key=value` in the tree and returns the key; what it sets at the top holds for every phase."""
    key, equals, text = override.partition("=")
    if not (equals and key):
        raise UserError(f"expected key=value after the recipe, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{key}: not a YAML value: {text!r}") from error
    names = key.split(".")
    if names[-1] in FORMER_KEYS:
        print(f"note: {key}: {names[-1]} is now called {FORMER_KEYS[names[-1]]}", file=sys.stderr)
        names[-1] = FORMER_KEYS[names[-1]]
        key = ".".join(names)
    value = _renamed(value, key)
    _assign(tree, names, value, key)
    phases = tree.get("phases")
    for phase in phases if isinstance(phases, list) else []:
        if names[0] != "phases" and _said(phase, names):
            _assign(phase, names, value, key)
    return key


def _said(node: Any, names: Sequence[str | int]) -> bool:
    """Whether the tree has a value at `node[names[0]][names[1]]…`."""
    for name in names:
        if isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, list) and str(name).isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            return False
    return True


def _assign(node: Any, names: Sequence[str], value: Any, key: str) -> None:
    """`node[names[0]][names[1]]… = value`, through mappings (made where missing) and lists."""
    name, *rest = names
    place: Any = name
    if isinstance(node, list):
        if not (name.isdecimal() and int(name) < len(node)):
            raise UserError(f"{key}: expected an index below {len(node)}, got {name!r}")
        place = int(name)
    elif not isinstance(node, dict):
        raise UserError(f"{key}: expected a mapping that holds {name}, got the value {node!r}")
    elif rest and node.get(name) is None:
        node[name] = {}
    if rest:
        _assign(node[place], rest, value, key)
    else:
        node[place] = value


def _explain(detail: Any, tree: Tree, overridden: Sequence[str]) -> str:
    """One of pydantic's errors as `key: expected …, got …`, the key as the file has it."""
    place = list(detail["loc"])
    inner = place[2:] if place[:1] == ["phases"] and len(place) > 1 else place
    if inner is not place and ("phases" not in tree or (inner and not _said(tree, place) and _said(tree, inner[:1]))):
        place = inner
    key = ".".join(map(str, place))
    origin = " (from the command line)" if any(f"{key}.".startswith(f"{name}.") for name in overridden) else ""
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key{origin}; the nearest known key is {_nearest(key)}"
    if detail["type"] == "missing":
        known = ".".join("N" if isinstance(part, int) else str(part) for part in inner)
        return f"{key}: missing; expected {dict(list_keys())[known].description}"
    message = detail["msg"].removeprefix("Value error, ")
    if message != detail["msg"]:  # one of the checks above, which name keys and values themselves
        return f"{key}.{message}" if key and re.match(r"[\w.]+: ", message) else f"{key}: {message}".removeprefix(": ")
    wanted = message.replace("Input should be", "expected").replace(", unable to parse string as a number", "")
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
