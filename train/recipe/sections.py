"""The parts of a recipe that say what learns from what, how: adapters, losses, data, optimizer."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from nemoe_jax.text.data.formats import KEYS

DType = Literal["float32", "bfloat16"]
Divergence = Literal["forward", "reverse", "skew-forward", "skew-reverse"]
FilePath = Annotated[Path, BeforeValidator(lambda value: Path(str(value)).expanduser() if value is not None else value)]
Globs = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


def _sources(value: Any) -> Any:
    """A path or a single source stands for a list of one; a path in the list for a source of that file."""
    values = value if isinstance(value, list) else [value]
    return [{"files": [item]} if isinstance(item, str) else item for item in values]


class Section(BaseModel):
    """A mapping of a recipe: unknown keys are errors; numbers that YAML takes for text (`1e-3`) are read as numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


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
    feature_loss: Literal["cosine", "l2"] | None = Field(
        None,
        description="a distance of student and teacher in what each layer adds to the stream, of models of one width "
        "and depth; default: none",
    )
    feature_of: list[Literal["ffn", "attention"]] = Field(
        ["ffn"], min_length=1, description="of feature_loss: which parts of a layer, the FFN dense or MoE; their mean"
    )
    feature_weight: float = Field(1.0, ge=0, description="of feature_loss: its weight, per token, a mean over layers")
    final_feature_weight: float | None = Field(
        None, ge=0, description="the same at the last step; default: feature_weight"
    )
    offline: FilePath | None = Field(
        None, description="directory of the teacher's predictions, from nemoe-train cache-teacher: no teacher in memory"
    )
    top_k: int = Field(64, gt=0, description="of offline: the teacher's likeliest tokens that are kept of each target")

    @model_validator(mode="after")
    def _constant(self) -> "Distill":
        if self.offline and self.final_temperature is not None:
            raise ValueError("final_temperature: expected none with offline, which is of one temperature")
        if self.offline and self.feature_loss:
            raise ValueError("feature_loss: expected none with offline, which keeps a teacher's predictions alone")
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
    split: str = Field("train", description="the dataset's split, or rows of it, such as train[400:400000]")
    streaming: bool = Field(
        False, description="read the dataset from where it is, as far as limit or split say; only its tokens are kept"
    )
    format: Literal["auto", *KEYS] = Field(  # type: ignore[valid-type]
        "auto", description="what a row looks like; auto goes by its keys"
    )
    weight: float | None = Field(None, gt=0, description="relative share of the training rows; default: by size")
    limit: int | None = Field(None, gt=0, description="documents to take at most, from the beginning")

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        if bool(self.files) == bool(self.dataset):
            raise ValueError("expected exactly one of files and dataset")
        if self.streaming and not self.dataset:
            raise ValueError("streaming: expected with dataset alone; files are streamed in any case")
        return self


Sources = Annotated[list[Source], BeforeValidator(_sources)]


class Data(Section):
    """Text and chats, packed into rows: no attention and no target crosses a document's end."""

    train: Sources = Field(min_length=1, description="sources, or simply a path")
    held_out: Sources = Field([], description="the same, for evaluation; files named here are left out of train")
    sequence_length: int = Field(gt=0, description="tokens of a row")
    warmup_length: int | None = Field(
        None, gt=0, description="tokens that rows are cut into at first, growing to sequence_length; default: whole"
    )
    warmup_length_steps: int = Field(0, ge=0, description="steps over which that length grows")
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
        if bool(self.warmup_length) != bool(self.warmup_length_steps):
            raise ValueError("warmup_length_steps: expected together with warmup_length, and neither alone")
        if self.warmup_length and self.warmup_length > self.sequence_length:
            raise ValueError(
                f"warmup_length: expected at most sequence_length {self.sequence_length}, got {self.warmup_length}"
            )
        return self

    def length_at(self, step: int) -> int:
        """Tokens that a step's documents are cut into, at most; steps count from 0."""
        if not self.warmup_length or step >= self.warmup_length_steps:
            return self.sequence_length
        return self.warmup_length + (self.sequence_length - self.warmup_length) * step // self.warmup_length_steps


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
