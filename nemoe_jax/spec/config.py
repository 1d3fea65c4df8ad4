"""ModelConfig: the mathematics of a model, and nothing of how it is run.

One dataclass covers the four families (a dense Mistral or Llama, a Mixtral, and NekoMind's mixture with a gated
shared expert, QK-norm and dense first layers). `from_hf` and `to_hf` translate config.json, in the spelling of
transformers 4 (`rope_theta`, `torch_dtype`) and of transformers 5 (`rope_parameters`, `dtype`).
"""

import dataclasses
import difflib
from typing import Any, Literal, NamedTuple

from nemoe_jax.errors import UserError
from nemoe_jax.spec import hf_config

Family = Literal["mistral", "llama", "mixtral", "nekomind"]
DTYPES = ("bfloat16", "float16", "float32")
_LARGEST_SIZE = 2**31 - 1  # what an index on a device can count

_ARCHITECTURES: dict[str, Family] = {
    "MistralForCausalLM": "mistral",
    "LlamaForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "NekoMindForCausalLM": "nekomind",
}


class LayerGroup(NamedTuple):
    """Consecutive layers of one kind; they are stacked and scanned together."""

    kind: Literal["dense", "moe"]
    first: int  # absolute number of the run's first layer
    layers: int


def _field(help: str, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU dense or mixed, no biases."""

    family: Family = _field("which Hugging Face architecture the checkpoint keys and config.json follow")
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
    rope_theta: float = _field("base of the rotary frequencies", 1e6)
    norm_eps: float = _field("epsilon of every RMSNorm", 1e-5)
    context: int = _field("longest sequence, tokens", 131072)
    dtype: str = _field("dtype of the weights on disk", "bfloat16")
    bos_token_id: int | None = _field("beginning-of-sequence token", 1)
    eos_token_id: int | tuple[int, ...] | None = _field("end-of-sequence token or tokens", 2)

    def __post_init__(self):
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
            problems.append(f"head_dim: RoPE wants an even size, got {self.head_dim}")
        if self.experts:
            if not 1 <= self.top_k <= self.experts:
                problems.append(f"top_k: expected 1 to experts = {self.experts}, got {self.top_k}")
            if self.expert_ffn < 1:
                problems.append(f"expert_ffn: expected a positive number, got {self.expert_ffn}")
            if not 0 <= self.dense_layers < self.layers:
                problems.append(f"dense_layers: expected 0 to {self.layers - 1}, got {self.dense_layers}")
        if self.ffn < 1 and (self.dense_layers or not self.experts):
            problems.append(f"ffn: the model has dense layers and wants a positive number, got {self.ffn}")
        if self.dtype not in DTYPES:
            problems.append(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.family != "nekomind":
            if self.shared_ffn or self.qk_norm or self.dense_layers or not self.normalize_top_k:
                problems.append(
                    f"family {self.family} cannot express a shared expert, QK-norm, dense first layers or "
                    "top-k weights that are not normalized; family nekomind can"
                )
            if bool(self.experts) != (self.family == "mixtral"):
                problems.append(f"family {self.family} with experts = {self.experts}")
        if problems:
            raise UserError("model config: " + "; ".join(problems))

    @property
    def runs(self) -> tuple[LayerGroup, ...]:
        """The model's layers as runs of equal blocks, in order."""
        if not self.experts:
            return (LayerGroup("dense", 0, self.layers),)
        dense = (LayerGroup("dense", 0, self.dense_layers),) if self.dense_layers else ()
        return (*dense, LayerGroup("moe", self.dense_layers, self.layers - self.dense_layers))

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, config: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """Reads the content of a config.json; `source` names it in errors.

        Raises:
            UserError: unknown architecture, a missing key, a value of the wrong kind, or a feature that this model does
                not have.
        """
        config = hf_config.given(config, source, hf_config.HUGGING_FACE)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope = hf_config.given(rope, f"{source}: RoPE", hf_config.ROPE)
        architecture = (config.get("architectures") or ["(none)"])[0]
        if architecture not in _ARCHITECTURES:
            raise UserError(f"{source}: unknown architecture {architecture}; known: {', '.join(_ARCHITECTURES)}")
        family = _ARCHITECTURES[architecture]
        _refuse_unsupported(config, rope, source)

        def need(key: str) -> Any:
            if key not in config:
                raise UserError(f"{source}: {key} is missing")
            return config[key]

        fields: dict[str, Any] = {
            "family": family,
            "hidden": need("hidden_size"),
            "layers": need("num_hidden_layers"),
            "heads": need("num_attention_heads"),
            "kv_heads": config.get("num_key_value_heads") or need("num_attention_heads"),
            # transformers itself falls back to hidden/heads where the config gives no head_dim
            "head_dim": config.get("head_dim") or need("hidden_size") // max(need("num_attention_heads"), 1),
            "vocab": need("vocab_size"),
            "tied": config.get("tie_word_embeddings", False),
            "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
            "context": need("max_position_embeddings"),
            "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
            "bos_token_id": config.get("bos_token_id"),
            "eos_token_id": _hashable(config.get("eos_token_id")),
        }
        if family == "mixtral":
            fields |= {
                "experts": need("num_local_experts"),
                "top_k": need("num_experts_per_tok"),
                "expert_ffn": need("intermediate_size"),
            }
        elif family == "nekomind":
            fields |= {
                "experts": need("num_experts"),
                "top_k": need("num_experts_per_tok"),
                "expert_ffn": need("moe_intermediate_size"),
                "shared_ffn": config.get("shared_expert_intermediate_size") or 0,
                "dense_layers": _leading_dense_layers(config, source),
                "normalize_top_k": config.get("norm_topk_prob", True),
                "qk_norm": config.get("qk_norm", True),
                "ffn": config.get("intermediate_size") or 0,
            }
        else:
            fields["ffn"] = need("intermediate_size")
        try:
            return cls(**fields)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The content of config.json, with both spellings of what transformers 5 renamed."""
        architecture = next(name for name, family in _ARCHITECTURES.items() if family == self.family)
        config: dict[str, Any] = {
            "architectures": [architecture],
            "model_type": self.family,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.context,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            "torch_dtype": self.dtype,
            "dtype": self.dtype,
            "initializer_range": 0.02,
            "use_cache": True,
        }
        if self.family in ("mistral", "mixtral"):
            config["sliding_window"] = None
        if self.family == "mixtral":
            config |= {
                "intermediate_size": self.expert_ffn,
                "num_local_experts": self.experts,
                "num_experts_per_tok": self.top_k,
            }
        elif self.family == "nekomind":
            config |= {
                "intermediate_size": self.ffn,
                "moe_intermediate_size": self.expert_ffn,
                "shared_expert_intermediate_size": self.shared_ffn,
                "num_experts": self.experts,
                "num_experts_per_tok": self.top_k,
                "mlp_only_layers": list(range(self.dense_layers)),
                "decoder_sparse_step": 1,
                "norm_topk_prob": self.normalize_top_k,
                "qk_norm": self.qk_norm,
            }
        else:
            config["intermediate_size"] = self.ffn
        return config


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _leading_dense_layers(config: dict[str, Any], source: str) -> int:
    dense = config.get("mlp_only_layers")
    if dense is None:
        return config.get("first_k_dense_replace") or 0
    if sorted(dense) != list(range(len(dense))) or config.get("decoder_sparse_step", 1) != 1:
        raise UserError(
            f"{source}: mlp_only_layers = {dense} with decoder_sparse_step = {config.get('decoder_sparse_step', 1)}; "
            "only dense layers before all MoE layers are supported"
        )
    return len(dense)


def _refuse_unsupported(config: dict[str, Any], rope: dict[str, Any], source: str) -> None:
    """Raises on what would silently change the logits if it were ignored."""
    rope_type = rope.get("rope_type") or rope.get("type")
    window = config.get("sliding_window")
    problems = [
        f"{key} = {config[key]} (biases are not supported)"
        for key in ("attention_bias", "mlp_bias", "qkv_bias")
        if config.get(key)
    ]
    if rope_type not in (None, "default"):
        problems.append(f"RoPE scaling of type {rope_type} (only the plain rotary embedding is supported)")
    if window is not None and window < config.get("max_position_embeddings", 0):
        problems.append(f"sliding_window = {window} (only full attention is supported)")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act = {config['hidden_act']} (only silu is supported)")
    if problems:
        raise UserError(f"{source}: " + "; ".join(problems))


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
