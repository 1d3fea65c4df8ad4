"""The model families: one record for each Hugging Face architecture, with all that tells it from the others.

The config, the parameter schema, PEFT's names, the GGUF export and `verify` read these records and know no family by
name. A new family is a record here, its name in `FamilyName`, and a parity test against transformers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

FamilyName = Literal["mistral", "llama", "mixtral", "nekomind", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "olmoe"]
Biases = Literal["none", "qkv", "qkvo"]  # which projections of the attention have one

# What a config may have beyond a plain dense decoder, by the words of an error.
EXPERTS = "experts"
SHARED = "a shared expert"
QK_NORM = "QK-norm"
FIRST_DENSE = "dense first layers"
UNNORMALIZED = "top-k weights that are not normalized"
WINDOW = "a sliding window"

_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Family:
    """What one architecture is called, what it can express, and what its files leave unsaid."""

    name: str  # ours, and transformers' `model_type`
    architecture: str  # of config.json
    fields: Mapping[str, str]  # {field of ModelConfig: its key in config.json}, beyond those that all families share
    defaults: Mapping[str, Any]  # {key of config.json: what transformers takes where it is left out}
    always: frozenset[str] = frozenset()  # features that every model of the family has
    sometimes: frozenset[str] = frozenset()
    biases: tuple[Biases, ...] = ("none",)  # those that it can express
    bias_key: str = "attention_bias"  # of config.json, where there is a choice
    wrappers: tuple[str, ...] = ()  # architectures of several modalities whose text model is one of this family
    window_switch: bool = False  # the window counts where `use_sliding_window` says so
    synonyms: tuple[tuple[str, str], ...] = ()  # (another key that is written, too; the key whose value it has)
    qk_norm_over: Literal["head", "projection"] = "head"  # what one RMS is taken of

    # names of parameters, without `model.layers.N.` and `.weight`
    router: str = "mlp.gate"
    experts: tuple[str, str, str] = tuple(f"mlp.experts.{{expert}}.{name}" for name in _MLP)  # type: ignore[assignment]

    modeling: str | None = None  # written beside the weights: with it transformers opens what it does not have itself

    # how transformers 5 holds the model in memory, which is what PEFT's names follow
    renamed: tuple[tuple[str, str], ...] = ()  # (part of a checkpoint's key, what became of it)
    router_is_parameter: bool = False  # of a module of its own kind, so that PEFT takes its weight as a parameter

    # what a carve of a dense model of the family is written as
    carved: FamilyName | None = "mixtral"
    carved_shared: FamilyName = "nekomind"  # with a shared expert

    # llama.cpp
    gguf: str | None = None  # its architecture
    gguf_permutes: bool = False  # RoPE turns neighboring rows of q and k there
    gguf_normalizes: bool | None = None  # whether it divides top-k weights by their sum; None: as the file says

    @property
    def in_transformers(self) -> bool:
        """Whether transformers has the architecture itself."""
        return self.modeling is None

    def can(self, feature: str) -> bool:
        """Whether a model of the family may have a feature."""
        return feature in self.always or feature in self.sometimes

    def module_of(self, key: str) -> str:
        """transformers' module that holds a checkpoint tensor."""
        module = key.removesuffix(".weight")
        for old, new in self.renamed:
            module = module.replace(old, new)
        return module

    def key_of(self, module: str) -> str:
        """The inverse of `module_of`, without the suffix."""
        for old, new in self.renamed:
            module = module.replace(new, old)
        return module


_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN = {
    **_DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_DENSE = {"ffn": "intermediate_size"}
_MOE = {
    "ffn": "intermediate_size",
    "expert_ffn": "moe_intermediate_size",
    "experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "dense_layers": "mlp_only_layers",
    "normalize_top_k": "norm_topk_prob",
}
_SHARED_MOE = {
    "ffn": "intermediate_size",
    "expert_ffn": "moe_intermediate_size",
    "shared_ffn": "shared_expert_intermediate_size",
    "experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "dense_layers": "mlp_only_layers",
    "normalize_top_k": "norm_topk_prob",
}

_RECORDS = (
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        wrappers=("Mistral3ForConditionalGeneration",),
        fields=_DENSE,
        defaults={
            **_DEFAULTS,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        sometimes=frozenset({WINDOW}),
        gguf="llama",
        gguf_permutes=True,
    ),
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        fields=_DENSE,
        defaults={
            **_DEFAULTS,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        biases=("none", "qkvo"),
        gguf="llama",
        gguf_permutes=True,
    ),
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        fields={"expert_ffn": "intermediate_size", "experts": "num_local_experts", "top_k": "num_experts_per_tok"},
        defaults={
            **_DEFAULTS,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        always=frozenset({EXPERTS}),
        sometimes=frozenset({WINDOW}),
        router="block_sparse_moe.gate",
        experts=tuple(f"block_sparse_moe.experts.{{expert}}.{name}" for name in ("w1", "w3", "w2")),  # type: ignore
        renamed=((".block_sparse_moe.", ".mlp."),),
        router_is_parameter=True,
        gguf="llama",
        gguf_permutes=True,
        gguf_normalizes=True,
    ),
    Family(
        name="nekomind",
        architecture="NekoMindForCausalLM",
        fields={**_SHARED_MOE, "qk_norm": "qk_norm"},
        defaults={**_DEFAULTS, "norm_topk_prob": True, "qk_norm": True},
        always=frozenset({EXPERTS}),
        sometimes=frozenset({SHARED, QK_NORM, FIRST_DENSE, UNNORMALIZED}),
        modeling="modeling_nekomind.py",
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        fields=_DENSE,
        defaults={**_QWEN, "max_window_layers": 28},
        sometimes=frozenset({WINDOW}),
        biases=("qkv",),
        window_switch=True,
        carved=None,
        carved_shared="qwen2_moe",
        gguf="qwen2",
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        fields=_DENSE,
        defaults={**_QWEN, "head_dim": 128, "max_window_layers": 28, "attention_bias": False},
        always=frozenset({QK_NORM}),
        sometimes=frozenset({WINDOW}),
        biases=("none", "qkvo"),
        window_switch=True,
        carved="qwen3_moe",
        gguf="qwen3",
    ),
    Family(
        name="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        fields=_SHARED_MOE,
        defaults={
            **_QWEN,
            "num_key_value_heads": 16,
            "max_window_layers": 28,
            "qkv_bias": True,
            "moe_intermediate_size": 1408,
            "intermediate_size": 5632,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        },
        always=frozenset({EXPERTS, SHARED}),
        sometimes=frozenset({FIRST_DENSE, UNNORMALIZED, WINDOW}),
        biases=("none", "qkv"),
        bias_key="qkv_bias",
        window_switch=True,
        router_is_parameter=True,
        gguf="qwen2moe",
        gguf_normalizes=False,
    ),
    Family(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        fields=_MOE,
        defaults={
            **_QWEN,
            "num_key_value_heads": 4,
            "attention_bias": False,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        },
        always=frozenset({EXPERTS, QK_NORM}),
        sometimes=frozenset({FIRST_DENSE, UNNORMALIZED, WINDOW}),
        biases=("none", "qkvo"),
        window_switch=True,
        synonyms=(("num_local_experts", "num_experts"),),
        router_is_parameter=True,
        gguf="qwen3moe",
        gguf_normalizes=True,
    ),
    Family(
        name="olmoe",
        architecture="OlmoeForCausalLM",
        fields={
            "expert_ffn": "intermediate_size",
            "experts": "num_experts",
            "top_k": "num_experts_per_tok",
            "normalize_top_k": "norm_topk_prob",
        },
        defaults={
            **_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "attention_bias": False,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "eos_token_id": 50279,
        },
        always=frozenset({EXPERTS, QK_NORM}),
        sometimes=frozenset({UNNORMALIZED}),
        biases=("none", "qkvo"),
        qk_norm_over="projection",
        router_is_parameter=True,
        gguf="olmoe",
        gguf_normalizes=False,
    ),
)
FAMILIES: Mapping[str, Family] = {record.name: record for record in _RECORDS}


def family_of(architecture: str | None, model_type: str | None) -> Family | None:
    """The record of an architecture; of a `model_type` where config.json names no architecture."""
    for record in _RECORDS:
        if architecture in (record.architecture, *record.wrappers) or (
            architecture is None and model_type == record.name
        ):
            return record
    return None
