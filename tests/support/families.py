"""A small model of transformers for each family: what parity is tested with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nemoe_jax.checkpoints.pretrained import load_pretrained
from nemoe_jax.spec.families import FAMILIES
from tests.support.compiled import forward

_COMMON = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
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


IDS = np.random.default_rng(0).integers(0, 72, (2, 29))


def make(family: str, **changes: Any) -> torch.nn.Module:
    """A small model of transformers."""
    return AutoModelForCausalLM.from_config(config_class(family)(**SIZES[family] | changes))


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough for logits of unit scale, and vectors that are not all ones or zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn_like(parameter)
            scaled = values * parameter.shape[-1] ** -0.5
            parameter.copy_(scaled if parameter.ndim > 1 else values if "bias" in name else 1 + 0.3 * values)
    return model.eval()


def torch_logits(model: torch.nn.Module, ids: np.ndarray = IDS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


def our_logits(directory: Path, ids: np.ndarray = IDS) -> np.ndarray:
    config, params = load_pretrained(directory)
    return np.asarray(forward(config, params, ids).logits)
