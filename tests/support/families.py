"""A small model of transformers for each family: what parity is tested with."""

from transformers import AutoConfig

from nemoe_jax.spec.families import FAMILIES

_COMMON = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 72,
    "max_position_embeddings": 96,
}
_MOE = {"num_experts_per_tok": 3, "moe_intermediate_size": 12, "mlp_only_layers": [0], "intermediate_size": 40}
SIZES = {
    "mistral": {**_COMMON, "intermediate_size": 48, "sliding_window": 7},
    "llama": {**_COMMON, "intermediate_size": 48, "attention_bias": True},
    "mixtral": {**_COMMON, "intermediate_size": 16, "num_local_experts": 4, "sliding_window": None},
    "qwen2": {**_COMMON, "intermediate_size": 48},
    "qwen3": {**_COMMON, "intermediate_size": 48, "attention_bias": True, "tie_word_embeddings": True},
    "qwen2_moe": {**_COMMON, **_MOE, "num_experts": 8, "shared_expert_intermediate_size": 14},
    "qwen3_moe": {**_COMMON, **_MOE, "num_experts": 8, "norm_topk_prob": True},
    # QK-norm over whole projections, and no head_dim of its own
    "olmoe": {**_COMMON, "head_dim": 4, "intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3},
}


def config_class(family: str) -> type:
    """transformers' config class of a family."""
    assert family in FAMILIES
    return type(AutoConfig.for_model(family))
