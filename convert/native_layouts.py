"""MoEs with a shared expert in architectures that other programs know: Qwen3-Next and Ernie 4.5 MoE.

NekoMind's layout opens in this package alone. Both rewritings are exact: every logit is the same.

- Qwen3-Next has QK-norm and a shared expert behind a gate. Its attention has an output gate as well, one sigmoid for
  each value of a head, computed by further rows of q: rows of zeros make it 1/2, and o is doubled. Its norms multiply
  by 1 + weight. All of its layers may be full attention.
- Ernie 4.5 MoE has neither QK-norm nor a gate of the shared expert, and RoPE of neighboring dimensions. A carve writes
  a gate of zeros, which is 1/2 for every token: the shared expert's `down` is halved.
"""

import dataclasses
from typing import Any

import numpy as np

from nemoe_jax.checkpoints import mistral_format
from nemoe_jax.checkpoints.layout import HUGGING_FACE, Layout
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.spec.hf_config import to_hf
from nemoe_jax.spec.schema import ParamSpec

QWEN3_NEXT, ERNIE = "qwen3-next", "ernie"
_GATE = "shared_expert_gate.weight"
_SHARED_KEYS = (  # of config.json, that all layouts have
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "torch_dtype",
    "dtype",
    "initializer_range",
    "use_cache",
)

Stored = dict[str, tuple[tuple[int, ...], str]]
Encoded = dict[str, np.ndarray]


def native_layout(to: str, checkpoint: Checkpoint) -> Layout:
    """The layout of that name for a model.

    Raises:
        UserError: the architecture cannot express the model; the error says why, and what to use instead.
    """
    check, layout = (_check_qwen3_next, _QWEN3_NEXT) if to == QWEN3_NEXT else (_check_ernie, _ERNIE)
    check(checkpoint)
    return layout


def _check_shared(config: ModelConfig, to: str) -> None:
    """Raises where a model has no need of a rewriting, or more than both architectures have."""
    family = FAMILIES[config.family]
    if not config.experts:
        raise UserError(f"--to {to}: expected an MoE, got a dense model, which {family.architecture} opens as it is")
    if not config.shared_ffn:
        instead = f"{family.architecture} opens as it is" if family.in_transformers else "carve with --layout mixtral"
        raise UserError(f"--to {to}: expected a shared expert, got none; {instead}")
    if config.attention_bias != "none" or config.sliding_window is not None:
        what = "a sliding window" if config.attention_bias == "none" else "biases in the attention"
        raise UserError(f"--to {to}: it has no {what}; {family.architecture} opens as it is")


def _check_qwen3_next(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    _check_shared(config, QWEN3_NEXT)
    if not config.qk_norm:
        raise UserError(f"--to {QWEN3_NEXT}: expected QK-norm, which this model does not have; use --to {ERNIE}")


def _check_ernie(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    _check_shared(config, ERNIE)
    if config.qk_norm:
        raise UserError(f"--to {ERNIE}: it has no QK-norm, which this model has; use --to {QWEN3_NEXT}")
    if not config.normalize_top_k:
        raise UserError(
            f"--to {ERNIE}: it divides top-k weights by their sum, which this model (norm_topk_prob) does not"
        )
    if config.shared_ffn % config.expert_ffn:
        raise UserError(
            f"--to {ERNIE}: expected a shared expert of a multiple of {config.expert_ffn} neurons, the width of an "
            f"expert, got {config.shared_ffn}; carve with --shared-ffn of such a multiple"
        )
    gates = [key for key in checkpoint.files if key.endswith(_GATE)]
    if moving := [key for key in gates if np.any(checkpoint.view(key))]:
        raise UserError(
            f"--to {ERNIE}: it has no gate of the shared expert, and {moving[0]} ({len(moving)} of {len(gates)}) is "
            "not all zeros as a carve writes it: the gate depends on the token"
        )


def _common(config: ModelConfig) -> dict[str, Any]:
    content = to_hf(config)
    return {key: content[key] for key in _SHARED_KEYS}


def _qwen3_next_content(config: ModelConfig) -> dict[str, Any]:
    content = _common(config)
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        **content,
        "rope_parameters": {**content["rope_parameters"], "partial_rotary_factor": 1.0},
        "partial_rotary_factor": 1.0,
        "layer_types": ["full_attention"] * config.layers,
        "mlp_only_layers": list(range(config.dense_layers)),
        "decoder_sparse_step": 1,
        "intermediate_size": config.ffn,
        "moe_intermediate_size": config.expert_ffn,
        "shared_expert_intermediate_size": config.shared_ffn,
        "num_experts": config.experts,
        "num_experts_per_tok": config.top_k,
        "norm_topk_prob": config.normalize_top_k,
        "attention_bias": False,
    }


def _ernie_content(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        **_common(config),
        "pad_token_id": None,
        "use_bias": False,
        "intermediate_size": config.ffn,
        "moe_intermediate_size": config.expert_ffn,
        "moe_num_experts": config.experts,
        "moe_k": config.top_k,
        "moe_num_shared_experts": config.shared_ffn // config.expert_ffn,
        "moe_layer_start_index": config.dense_layers,
        "moe_layer_end_index": config.layers - 1,
        "moe_layer_interval": 1,
    }


def _is_norm(name: str) -> bool:
    return name.endswith(("norm.weight", "layernorm.weight"))


def _qwen3_next_stored(spec: ParamSpec, name: str, dtype: str) -> Stored:
    shape = spec.torch_shape
    if name.endswith(".q_proj.weight"):
        return {name: ((2 * shape[0], shape[1]), dtype)}
    # half-precision weights below 1/2 have no exact neighbor at weight - 1
    return {name: (shape, "float32" if _is_norm(name) else dtype)}


def _qwen3_next_encode(spec: ParamSpec, name: str, tensor: np.ndarray) -> Encoded:
    if _is_norm(name):
        return {name: tensor.astype(np.float32) - 1}
    if name.endswith(".q_proj.weight"):
        heads, head_dim = spec.shape[-2:]
        by_head = tensor.reshape(heads, head_dim, -1)
        return {name: np.concatenate([by_head, np.zeros_like(by_head)], axis=1).reshape(2 * len(tensor), -1)}
    return {name: tensor + tensor if name.endswith(".o_proj.weight") else tensor}


def _ernie_name(key: str) -> str:
    return key.replace(".shared_expert.", ".shared_experts.")


def _ernie_stored(spec: ParamSpec, name: str, dtype: str) -> Stored:
    if name.endswith(_GATE):
        return {}
    stored: Stored = {name: (spec.torch_shape, dtype)}
    if name.endswith(".mlp.gate.weight"):
        stored[_statics(name)] = (1, spec.torch_shape[0]), "float32"
    return stored


def _ernie_encode(spec: ParamSpec, name: str, tensor: np.ndarray) -> Encoded:
    if name.endswith(_GATE):
        return {}
    if name.endswith(".mlp.gate.weight"):
        return {name: tensor, _statics(name): np.zeros((1, len(tensor)), np.float32)}
    return {name: tensor / tensor.dtype.type(2) if name.endswith(".shared_experts.down_proj.weight") else tensor}


def _statics(router: str) -> str:
    """The bias by which Ernie's routers choose (not weigh) experts."""
    return router.replace(".gate.weight", ".moe_statics.e_score_correction_bias")


_QWEN3_NEXT = dataclasses.replace(
    HUGGING_FACE, content=_qwen3_next_content, stored=_qwen3_next_stored, encode=_qwen3_next_encode
)
_ERNIE = dataclasses.replace(
    HUGGING_FACE,
    content=_ernie_content,
    name=_ernie_name,
    to_disk=mistral_format.to_mistral_rows,  # the same order of a head's rows
    stored=_ernie_stored,
    encode=_ernie_encode,
)
