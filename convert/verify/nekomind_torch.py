"""A torch reference for NekoMind, put together from transformers' own parts.

transformers has no NekoMind, but it has its blocks: Qwen3's attention (RMSNorm on each query and key head before RoPE)
and decoder layer, with Qwen2-MoE's sparse block (routed experts and a shared expert behind a sigmoid gate) as the FFN
of the MoE layers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Qwen2MoeConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.hf_config import from_hf


def build_nekomind(config: ModelConfig) -> Qwen3ForCausalLM:
    """The torch model of that shape, with fresh weights."""
    common: dict[str, Any] = {
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "vocab_size": config.vocab,
        "intermediate_size": config.ffn,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied,
    }
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    model = Qwen3ForCausalLM(Qwen3Config(**common, head_dim=config.head_dim, rope_parameters=rope))
    moe = Qwen2MoeConfig(
        **common,
        num_experts=config.experts,
        num_experts_per_tok=config.top_k,
        moe_intermediate_size=config.expert_ffn,
        shared_expert_intermediate_size=config.shared_ffn,
        norm_topk_prob=config.normalize_top_k,
    )
    moe._experts_implementation = "eager"  # the grouped kernels want rows of a multiple of 16 bytes
    if not config.qk_norm:
        for layer in model.model.layers:
            layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    for layer in model.model.layers[config.dense_layers :]:
        layer.mlp = Qwen2MoeSparseMoeBlock(moe)
    return model.eval()


def load_nekomind(directory: str | Path) -> Qwen3ForCausalLM:
    """The torch model of a NekoMind directory, float32."""
    directory = Path(directory)
    config = from_hf(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= {name: tensor.float() for name, tensor in load_file(path).items()}
    model = build_nekomind(config)
    if config.tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for layer in range(config.dense_layers, config.layers):  # transformers 5 keeps the experts fused in memory
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}{expert}.{name}.weight") for expert in range(config.experts)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        tensors[prefix + "gate_up_proj"], tensors[prefix + "down_proj"] = torch.cat([gate, up], dim=1), down
    model.load_state_dict(tensors)
    return model
