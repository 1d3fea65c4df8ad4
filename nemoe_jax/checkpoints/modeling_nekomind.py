"""NekoMind for transformers, which opens a directory that holds this file with `trust_remote_code=True`.

The file stands for itself: it is written beside the weights. transformers has NekoMind's parts: Qwen3-MoE's attention
(RMSNorm of each query and key head before RoPE), routed experts and dense first layers, and Qwen2-MoE's shared expert
behind a sigmoid gate.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeMLP, Qwen3MoeSparseMoeBlock

try:  # transformers 5 fuses the experts, which are one by one in the files
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError:
    pass
else:
    register_checkpoint_conversion_mapping("nekomind", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


class NekoMindConfig(Qwen3MoeConfig):
    """Qwen3-MoE's, and the width of the shared expert."""

    model_type = "nekomind"
    shared_expert_intermediate_size: int = 0
    qk_norm: bool = True


class NekoMindSparseMoeBlock(Qwen3MoeSparseMoeBlock):
    """Routed experts, and a shared one times the sigmoid of its gate."""

    def __init__(self, config: NekoMindConfig):
        super().__init__(config)
        self.shared_expert = Qwen3MoeMLP(config, intermediate_size=config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        routed = super().forward(hidden_states)
        shared = torch.sigmoid(self.shared_expert_gate(hidden_states)) * self.shared_expert(hidden_states)
        if isinstance(routed, tuple):  # transformers 4 gives the router's logits as well
            return routed[0] + shared, *routed[1:]
        return routed + shared


class NekoMindForCausalLM(Qwen3MoeForCausalLM):
    """NekoMind with its language model head.

    The experts have @use_experts_implementation: transformers 5 looks for that word in a model's file before it takes
    another implementation of them than the slow one.
    """

    config_class = NekoMindConfig

    def __init__(self, config: NekoMindConfig):
        super().__init__(config)
        for layer in self.model.layers:
            if not config.qk_norm:
                layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
            if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):
                layer.mlp = NekoMindSparseMoeBlock(config)
        self.post_init()


AutoConfig.register("nekomind", NekoMindConfig, exist_ok=True)
AutoModelForCausalLM.register(NekoMindConfig, NekoMindForCausalLM, exist_ok=True)
NekoMindConfig.register_for_auto_class()
NekoMindForCausalLM.register_for_auto_class("AutoModelForCausalLM")
