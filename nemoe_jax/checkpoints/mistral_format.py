"""Mistral's own layout of a model: params.json, and the tensors of consolidated.safetensors.

It holds the numbers of the Hugging Face layout under other names, except that the rows of q and k stand in another
order. RoPE rotates pairs of a head's dimensions: Mistral's reference code pairs neighbors, 2i with 2i + 1, Hugging
Face's pairs i with i + H/2. Queries and keys are reordered alike, so that their products are the same.

H head_dim, D embed.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from nemoe_jax.errors import UserError
from nemoe_jax.spec import config_values, hf_config
from nemoe_jax.spec.config import ModelConfig

# {Hugging Face's name: Mistral's}, without `.weight`; {} is a number.
NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.layers.{}.input_layernorm": "layers.{}.attention_norm",
    "model.layers.{}.self_attn.q_proj": "layers.{}.attention.wq",
    "model.layers.{}.self_attn.k_proj": "layers.{}.attention.wk",
    "model.layers.{}.self_attn.v_proj": "layers.{}.attention.wv",
    "model.layers.{}.self_attn.o_proj": "layers.{}.attention.wo",
    "model.layers.{}.post_attention_layernorm": "layers.{}.ffn_norm",
    "model.layers.{}.mlp.gate_proj": "layers.{}.feed_forward.w1",
    "model.layers.{}.mlp.down_proj": "layers.{}.feed_forward.w2",
    "model.layers.{}.mlp.up_proj": "layers.{}.feed_forward.w3",
    "model.layers.{}.block_sparse_moe.gate": "layers.{}.feed_forward.gate",
    "model.layers.{}.block_sparse_moe.experts.{}.w1": "layers.{}.feed_forward.experts.{}.w1",
    "model.layers.{}.block_sparse_moe.experts.{}.w2": "layers.{}.feed_forward.experts.{}.w2",
    "model.layers.{}.block_sparse_moe.experts.{}.w3": "layers.{}.feed_forward.experts.{}.w3",
    "model.norm": "norm",
    "lm_head": "output",
}
_BACK = {ours: theirs for theirs, ours in NAMES.items()}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SUFFIX = ".weight"
_ROTATED = (".q_proj.weight", ".k_proj.weight")

# {key of params.json: key of config.json}
_PARAMS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_OPTIONAL = {
    "rope_theta": "rope_theta",
    "max_position_embeddings": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}
_MOE = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"}
_READ = {**_PARAMS, "max_seq_len": "max_position_embeddings", "sliding_window": "sliding_window", **_OPTIONAL}
_DEFAULTS = {"rope_theta": 1e6, "max_position_embeddings": 131072, "sliding_window": None}
# Parts of other models; null, 0 and false are as good as absent.
_UNSUPPORTED = ("_sliding_window", "llama_4_scaling", "lora", "q_lora_rank", "vision_encoder", "yarn")
_ARCHITECTURES = {"mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}


def to_mistral_key(key: str) -> str:
    """`layers.3.attention.wq.weight` of `model.layers.3.self_attn.q_proj.weight`.

    Raises:
        UserError: Mistral's layout has no such tensor.
    """
    name = _renamed(key, NAMES)
    if name is None:
        raise UserError(f"Mistral's layout has no tensor {key}")
    return name


def from_mistral_key(name: str) -> str | None:
    """The inverse of `to_mistral_key`; None for what has no name of this layout."""
    return _renamed(name, _BACK)


def _renamed(key: str, names: dict[str, str]) -> str | None:
    name = names.get(_NUMBER.sub("{}", key.removesuffix(_SUFFIX) + ".").removesuffix("."))
    if name is None or not key.endswith(_SUFFIX):
        return None
    return name.format(*_NUMBER.findall(key)) + _SUFFIX


def to_mistral_rows(key: str, tensor: np.ndarray, head_dim: int) -> np.ndarray:
    """The tensor of Hugging Face's name `key` in Mistral's layout: q and k (…·H, D) copied, others as they are."""
    return _reordered(tensor, 2, head_dim // 2) if key.endswith(_ROTATED) else tensor


def from_mistral_rows(key: str, tensor: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of `to_mistral_rows`; `key` is Hugging Face's name here, too."""
    return _reordered(tensor, head_dim // 2, 2) if key.endswith(_ROTATED) else tensor


def _reordered(tensor: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """Each head's rows, as an (outer, inner) table, in the table's other order."""
    return tensor.reshape(-1, outer, inner, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)


def from_params(content: Any, source: str = "params.json") -> ModelConfig:
    """Reads the content of a params.json; `source` names it in errors.

    Some things it does not say, or not always. The context, where neither `max_position_embeddings` nor `max_seq_len`
    gives it, is that of Mistral NeMo, 131072 tokens; `rope_theta` is then 1e6, as in Mistral's reference code. The
    tokens 1 and 2 begin and end a sequence, as in all of Mistral's tokenizers. The dtype is bfloat16: whoever has the
    weights knows better.

    Raises:
        UserError: a missing key, a value of the wrong kind, or a feature that this model does not have.
    """
    kinds = {ours: config_values.HUGGING_FACE[theirs] for ours, theirs in {**_READ, **_MOE}.items()}
    params = config_values.given(content, source, kinds | config_values.MOE)
    moe = config_values.given(params.get("moe", {}), f"{source}: moe", kinds)
    missing = [key for key in _PARAMS if key not in params]
    missing += [f"moe: {key}" for key in _MOE if "moe" in params and key not in moe]
    unsupported = [key for key in _UNSUPPORTED if params.get(key)]
    unsupported += [f"moe: {key!r}" for key in moe if key not in _MOE and moe[key]]
    if params.get("model_type", "transformer") != "transformer":
        unsupported.append("model_type")
    if missing or unsupported:
        problems = [f"{key} is missing" for key in missing] + [f"{key} (not supported)" for key in unsupported]
        raise UserError(f"{source}: " + "; ".join(problems))
    architecture = _ARCHITECTURES["mixtral" if "moe" in params else "mistral"]
    config = {"architectures": [architecture], "dtype": "bfloat16", **_DEFAULTS}
    config |= {theirs: params[ours] for ours, theirs in _READ.items() if ours in params}
    config |= {theirs: moe[ours] for ours, theirs in _MOE.items() if ours in moe}
    return hf_config.from_hf(config, source)


def to_params(config: ModelConfig) -> dict[str, Any]:
    """The content of params.json.

    Raises:
        UserError: the model has what this layout cannot say; all of it is named.
    """
    if config.family not in _ARCHITECTURES:
        raise UserError(f"Mistral's layout holds models of family {' or '.join(_ARCHITECTURES)}, not {config.family}")
    theirs = hf_config.to_hf(config)
    params = {ours: theirs[key] for ours, key in {**_PARAMS, **_OPTIONAL}.items()}
    if config.sliding_window:
        params["sliding_window"] = config.sliding_window
    if config.experts:
        params["moe"] = {ours: theirs[key] for ours, key in _MOE.items()}
    again = from_params(params).replace(dtype=config.dtype)
    lost = [
        f"{field.name} = {getattr(config, field.name)} (it means {getattr(again, field.name)})"
        for field in dataclasses.fields(config)
        if getattr(again, field.name) != getattr(config, field.name)
    ]
    if lost:
        raise UserError(f"Mistral's layout cannot say {', '.join(lost)}")
    return params
