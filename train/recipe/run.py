"""A whole run: its phases, the model that they begin with, and what is kept."""

import dataclasses
from typing import Any, Literal

from pydantic import Field, create_model, model_validator

from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.fp8_weight import Quantization
from nemoe_jax.text.tokenizers.load import Tokenizer
from train.recipe.sections import Data, Distill, DType, FilePath, Globs, LoraTarget, Optimizer, Preference, Section


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


QUANTIZED_BASES: dict[str | None, Quantization] = {"fp8-base": "fp8", "nf4": "nf4"}  # what frozen linear maps lie in


class Phase(Section):
    """One phase of a run."""

    name: str = Field("train", pattern=r"^[\w.-]+$", description="name in reports and of the adapter's directory")
    trainable: Literal["lora", "router", "weights", "esft", "all"] = Field(
        "lora",
        description="what learns: adapters (with train_router the routers, too), routers alone, the weights that match "
        "one of weights, the experts that the text uses, every weight",
    )
    esft_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="for trainable: esft: share of each layer's routing weights on the text that the experts have "
        "together which learn, the fewest",
    )
    esft_batches: int = Field(32, gt=0, description="microbatches of the text that this is measured on before")
    weights: Globs = Field(
        [], description="globs over the parameter paths, such as blocks/*/ffn/*, for trainable: weights"
    )
    lora: list[LoraTarget] = Field([], description="adapters, for trainable: lora")
    adapter: FilePath | None = Field(None, description="PEFT adapter to go on from, instead of lora: its targets")
    train_router: bool = Field(False, description="with adapters, whether the routers themselves learn as well")
    tie_router_rows: bool = Field(
        True,
        description="whether router rows that are alike as the phase begins, those of groups of top-k experts that a "
        "carve by token clusters makes, stay alike while they learn; other routers learn as ever",
    )
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
    router_bias_rate: float = Field(
        0.0,
        ge=0,
        description="loss-free balancing: by how much a step raises or lowers a bias of each expert, by its load; the "
        "bias is added to the router's logits for the choice of experts alone, and not saved; 0: none",
    )
    router_bias_until: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of the steps after which there is no such bias; it vanishes over the second half of them",
    )
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
        elif (self.trainable == "esft") != (self.esft_share is not None):
            wrong = f"esft_share: expected with trainable: esft alone, got {self.esft_share} with {self.trainable}"
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
        elif self.data.warmup_length and (self.preference or (self.distill and self.distill.offline)):
            wrong = "data.warmup_length: expected none with preference or distill.offline, which want whole rows"
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
    quantize: Literal["fp8", "fp8-base", "nf4"] | None = Field(
        None,
        description="fp8: the model is trained as FP8 will hold it, its linear maps rounded with their adapters in "
        "every forward pass (quantization-aware). fp8-base, nf4: the frozen linear maps lie in FP8 or in 4 bits under "
        "adapters that are not rounded (QLoRA). default: not rounded",
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
        elif self.quantize == "fp8" and any(target.dropout for phase in self.phases for target in phase.lora):
            wrong = "lora.dropout: expected 0 with quantize: fp8, which rounds weights and adapter together"
        elif self.quantize in QUANTIZED_BASES and any(phase.trainable in ("weights", "all") for phase in self.phases):
            wrong = f"quantize: {self.quantize} is for frozen weights; expected trainable: lora or router"
        elif self.quantize and any(phase.trainable == "esft" for phase in self.phases):
            wrong = "trainable: esft: expected no quantize beside it"
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
