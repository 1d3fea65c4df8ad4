"""ModelConfig: the mathematics of a model, and nothing of how it is run.

One dataclass covers all families of families.py, dense models and MoEs. hf_config.py translates config.json.
"""

import dataclasses
import difflib
from typing import Any, Literal, NamedTuple

from nemoe_jax.errors import UserError
from nemoe_jax.spec import families
from nemoe_jax.spec.families import FAMILIES, Biases, FamilyName

DTYPES = ("bfloat16", "float16", "float32")
_LARGEST_SIZE = 2**31 - 1  # what an index on a device can count


class LayerGroup(NamedTuple):
    """Consecutive layers of one kind; they are stacked and scanned together."""

    kind: Literal["dense", "moe"]
    first: int  # absolute number of the group's first layer
    layers: int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched to a longer context than the model was first trained with.

    - linear: all of them divided by the factor (Chen et al., 2023).
    - dynamic: their base grows with the length of the sequence once that is beyond the context ("NTK-aware").
    - yarn: the slow ones divided, the fast ones not, a ramp between, and a temperature (Peng et al., 2023).
    - llama3: that of Llama 3.1 to 3.3: the same by wavelength, without the temperature.
    """

    type: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float
    original_context: int = 0  # tokens; of yarn and llama3
    low_freq_factor: float = 1.0  # of llama3
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0  # of yarn: what cosine and sine are multiplied by
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        if not self.factor > 0:
            raise UserError(f"RoPE scaling: factor: expected a positive number, got {self.factor}")
        if self.type in ("yarn", "llama3") and self.original_context < 1:
            raise UserError(
                "RoPE scaling: original_max_position_embeddings: expected a positive number, "
                f"got {self.original_context}"
            )
        if self.type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                "RoPE scaling: expected 0 < low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.type == "yarn" and not (self.beta_fast > 0 and self.beta_slow > 0):
            raise UserError(
                f"RoPE scaling: expected positive beta_fast and beta_slow, got {self.beta_fast} and {self.beta_slow}"
            )

    def to_hf(self) -> dict[str, Any]:
        """What config.json says of it."""
        content: dict[str, Any] = {"rope_type": self.type, "factor": self.factor}
        if self.type in ("yarn", "llama3"):
            content["original_max_position_embeddings"] = self.original_context
        keys: dict[str, tuple[str, ...]] = {
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate"),
        }
        return content | {key: getattr(self, key) for key in keys.get(self.type, ())}


def _field(help: str, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU dense or sparse."""

    family: FamilyName = _field("which Hugging Face architecture the checkpoint keys and config.json follow")
    hidden: int = _field("width of the residual stream")
    layers: int = _field("number of blocks")
    heads: int = _field("query heads")
    kv_heads: int = _field("key/value heads; divides heads")
    head_dim: int = _field("size of one head; not hidden/heads in NeMo")
    vocab: int = _field("rows of the embedding")
    ffn: int = _field("neurons of a dense FFN; 0 where no layer is dense", 0)
    experts: int = _field("experts of an MoE layer; 0 for a dense model", 0)
    top_k: int = _field("experts chosen per token", 0)
    expert_ffn: int = _field("neurons of one expert", 0)
    shared_ffn: int = _field("neurons of the always-active shared expert with its sigmoid gate; 0 for none", 0)
    dense_layers: int = _field("how many first layers of an MoE model are dense", 0)
    normalize_top_k: bool = _field("softmax over the chosen experts only (else over all)", True)
    qk_norm: bool = _field("RMSNorm on each query and key head, before RoPE", False)
    tied: bool = _field("the output head is the embedding", False)
    attention_bias: Biases = _field("which projections of the attention have a bias: none, qkv or qkvo", "none")
    sliding_window: int | None = _field("how many tokens a token sees, itself included; all by default", None)
    rope_theta: float = _field("base of the rotary frequencies", 1e6)
    rope_scaling: RopeScaling | None = _field("how they are stretched to a longer context", None)
    norm_eps: float = _field("epsilon of every RMSNorm", 1e-5)
    context: int = _field("longest sequence, tokens", 131072)
    dtype: str = _field("dtype of the weights on disk", "bfloat16")
    bos_token_id: int | None = _field("beginning-of-sequence token", 1)
    eos_token_id: int | tuple[int, ...] | None = _field("end-of-sequence token or tokens", 2)

    def __post_init__(self):
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if self.family not in FAMILIES:
            raise UserError(f"model config: family: expected one of {', '.join(FAMILIES)}, got {self.family}")
        problems = []
        for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "vocab", "context"):
            if getattr(self, name) < 1:
                problems.append(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("ffn", "experts", "top_k", "expert_ffn", "shared_ffn", "dense_layers"):
            if getattr(self, name) < 0:
                problems.append(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name, size in vars(self).items():
            if type(size) is int and size > _LARGEST_SIZE:
                problems.append(f"{name}: expected at most {_LARGEST_SIZE}, got {size}")
        if not self.rope_theta > 0:
            problems.append(f"rope_theta: expected a positive number, got {self.rope_theta}")
        if not self.norm_eps >= 0:
            problems.append(f"norm_eps: expected 0 or more, got {self.norm_eps}")
        if self.kv_heads > 0 and self.heads % self.kv_heads:
            problems.append(f"kv_heads: expected a divisor of heads = {self.heads}, got {self.kv_heads}")
        if self.head_dim % 2:
            problems.append(f"head_dim: RoPE needs an even size, got {self.head_dim}")
        if self.experts:
            if not 1 <= self.top_k <= self.experts:
                problems.append(f"top_k: expected 1 to experts = {self.experts}, got {self.top_k}")
            if self.expert_ffn < 1:
                problems.append(f"expert_ffn: expected a positive number, got {self.expert_ffn}")
            if not 0 <= self.dense_layers < self.layers:
                problems.append(f"dense_layers: expected 0 to {self.layers - 1}, got {self.dense_layers}")
        if self.ffn < 1 and (self.dense_layers or not self.experts):
            problems.append(f"ffn: expected a positive number for its dense layers, got {self.ffn}")
        if self.dtype not in DTYPES:
            problems.append(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.sliding_window is not None and self.sliding_window < 1:
            problems.append(f"sliding_window: expected a positive number, got {self.sliding_window}")
        problems += self._unlike_family()
        if problems:
            raise UserError("model config: " + "; ".join(problems))

    @property
    def features(self) -> set[str]:
        """What it has beyond a plain dense decoder, by the words of families.py."""
        has = {
            families.EXPERTS: self.experts,
            families.SHARED: self.shared_ffn,
            families.QK_NORM: self.qk_norm,
            families.FIRST_DENSE: self.dense_layers,
            families.UNNORMALIZED: not self.normalize_top_k,
            families.WINDOW: self.sliding_window,
        }
        return {name for name, value in has.items() if value}

    def _unlike_family(self) -> list[str]:
        """What the family cannot express, or cannot be without."""
        family = FAMILIES[self.family]
        problems: list[str] = []
        beyond = sorted(name for name in self.features if not family.can(name))
        if beyond:
            able = [other.name for other in FAMILIES.values() if all(map(other.can, self.features))]
            hint = f"; family {' or '.join(able)} can" if able else ""
            problems.append(f"family {family.name} cannot express {', '.join(beyond)}{hint}")
        lacking = sorted(family.always - self.features)
        if lacking:
            problems.append(f"family {family.name} always has {', '.join(lacking)}")
        if self.attention_bias not in family.biases:
            expected = " or ".join(family.biases)
            problems.append(f"attention_bias: family {family.name}: expected {expected}, got {self.attention_bias}")
        return problems

    @property
    def runs(self) -> tuple[LayerGroup, ...]:
        """The model's layers as groups of equal blocks, in order."""
        if not self.experts:
            return (LayerGroup("dense", 0, self.layers),)
        dense = (LayerGroup("dense", 0, self.dense_layers),) if self.dense_layers else ()
        return (*dense, LayerGroup("moe", self.dense_layers, self.layers - self.dense_layers))

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)


_NEMO = ModelConfig(
    family="mistral", hidden=5120, layers=40, heads=32, kv_heads=8, head_dim=128, vocab=131072, ffn=14336
)
PRESETS: dict[str, ModelConfig] = {
    "mistral-nemo-12b": _NEMO,
    "nemoe-12b-16e": _NEMO.replace(family="mixtral", ffn=0, experts=16, top_k=4, expert_ffn=14336 // 16),
    "minitron-8b": _NEMO.replace(hidden=4096, ffn=11520, context=8192),
    "nekomind1.5-1b": ModelConfig(
        family="nekomind",
        hidden=1024,
        layers=18,
        heads=8,
        kv_heads=4,
        head_dim=128,
        vocab=32006,
        ffn=3072,
        experts=32,
        top_k=4,
        expert_ffn=768,
        shared_ffn=768,
        dense_layers=2,
        qk_norm=True,
        tied=True,
        context=32768,
    ),
}


def preset(name: str) -> ModelConfig:
    """The published shape of that name.

    Raises:
        UserError: no such preset; the nearest is suggested.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no preset {name}{hint} (presets: {', '.join(PRESETS)})")
    return PRESETS[name]
