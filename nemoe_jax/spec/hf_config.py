"""config.json of Hugging Face as a ModelConfig, and back.

Both spellings are read and written: that of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of
transformers 5 (`rope_parameters`, `dtype`). What a file leaves out is taken from its family's record, as transformers
takes it from its config classes.
"""

import math
from pathlib import Path
from typing import Any

from nemoe_jax.errors import UserError
from nemoe_jax.spec import config_values, families
from nemoe_jax.spec.config import ModelConfig, RopeScaling
from nemoe_jax.spec.families import FAMILIES, Family, family_of

# {key: field} that all families share and every file has to say
_SIZES = {"hidden_size": "hidden", "num_hidden_layers": "layers", "num_attention_heads": "heads", "vocab_size": "vocab"}
# null says something in these: no window, as many key/value heads as heads, no token
_NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window", "bos_token_id", "eos_token_id")
_SLIDING = "sliding_attention"  # a layer's type
_SAME_EXPERTS = ("num_experts", "num_local_experts")


def from_hf(content: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads the content of a config.json; `source` names it in errors.

    Raises:
        UserError: unknown architecture, a missing key, a value of the wrong kind, or a feature that this model does not
            have.
    """
    given = config_values.given(content, source, config_values.HUGGING_FACE)
    architecture = (given.get("architectures") or [None])[0]
    family = family_of(architecture, given.get("model_type"))
    if family is None:
        known = ", ".join(record.architecture for record in FAMILIES.values())
        named = architecture or (f"of model_type {given['model_type']}" if "model_type" in given else "(none)")
        raise UserError(f"{source}: unknown architecture {named}; known: {known}")
    if architecture in family.wrappers and "text_config" in given:
        return from_hf(_text_config(given, family), source)
    nulls = {key: None for key in _NULLABLE if key in content and content[key] is None}
    values = {**family.defaults, **given, **nulls}
    _refuse_unsupported(family, values, source)

    def need(key: str) -> Any:
        if values.get(key) is None:
            raise UserError(f"{source}: {key} is missing")
        return values[key]

    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    rope = config_values.given(rope, f"{source}: RoPE", config_values.ROPE)
    context = need("max_position_embeddings")
    eos = values["eos_token_id"]
    fields: dict[str, Any] = {
        "family": family.name,
        **{field: need(key) for key, field in _SIZES.items()},
        "kv_heads": values["num_key_value_heads"] or need("num_attention_heads"),
        # transformers itself falls back to hidden/heads where the config gives no head_dim
        "head_dim": values["head_dim"] or need("hidden_size") // max(need("num_attention_heads"), 1),
        "tied": values["tie_word_embeddings"],
        "rope_theta": float(rope.get("rope_theta") or values["rope_theta"]),
        "rope_scaling": _rope_scaling(rope, context, source),
        "norm_eps": float(values["rms_norm_eps"]),
        "context": context,
        "sliding_window": _window(family, values, context, source),
        "dtype": given.get("dtype") or given.get("torch_dtype") or "float32",
        "bos_token_id": values["bos_token_id"],
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
        "qk_norm": families.QK_NORM in family.always,
        "attention_bias": family.biases[bool(values.get(family.bias_key)) if len(family.biases) > 1 else 0],
    }
    for field, key in family.fields.items():
        if key in _SAME_EXPERTS:
            fields[field] = _experts(given, need, key, source)
        elif field == "dense_layers":
            fields[field] = _leading_dense_layers(values, source)
        elif field in ("ffn", "shared_ffn") and len(family.fields) > 1:
            fields[field] = values.get(key) or 0
        else:
            fields[field] = need(key)
    try:
        return ModelConfig(**fields)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json."""
    family = FAMILIES[config.family]
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling.to_hf() if config.rope_scaling else {}
    eos = config.eos_token_id
    content: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope | scaling,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "torch_dtype": config.dtype,
        "dtype": config.dtype,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if scaling:
        content["rope_scaling"] = scaling
    if family.window_switch:
        content["use_sliding_window"] = config.sliding_window is not None
        if "max_window_layers" in family.defaults:
            content["max_window_layers"] = 0 if config.sliding_window else config.layers
            content["layer_types"] = [
                "sliding_attention" if config.sliding_window else "full_attention"
            ] * config.layers
    if family.can(families.WINDOW):
        content["sliding_window"] = config.sliding_window
    if len(family.biases) > 1:
        content[family.bias_key] = config.attention_bias != "none"
    for field, key in family.fields.items():
        if field == "dense_layers":
            content |= {key: list(range(config.dense_layers)), "decoder_sparse_step": 1}
        else:
            content[key] = getattr(config, field)
    if family.modeling:
        module, name = Path(family.modeling).stem, family.architecture.removesuffix("ForCausalLM")
        classes = {"AutoConfig": f"{name}Config", "AutoModelForCausalLM": family.architecture}
        content["auto_map"] = {auto: f"{module}.{own}" for auto, own in classes.items()}
    return content | {key: content[same] for key, same in family.synonyms}


def _text_config(given: dict[str, Any], family: Family) -> dict[str, Any]:
    """The text model of several modalities, as a config of its own."""
    shared = {key: given[key] for key in ("dtype", "torch_dtype", "tie_word_embeddings") if key in given}
    text = {**shared, **given["text_config"]}
    return {
        **text,
        "architectures": [family.architecture] if text.get("model_type", family.name) == family.name else None,
    }


def _experts(given: dict[str, Any], need: Any, key: str, source: str) -> int:
    """How many there are, under whichever name the file has."""
    found = {name: given[name] for name in _SAME_EXPERTS if name in given}
    if len(set(found.values())) > 1:
        raise UserError(f"{source}: expected one number of experts, got {found}")
    return next(iter(found.values())) if found else need(key)


def _rope_scaling(rope: dict[str, Any], context: int, source: str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    required = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in required:
        raise UserError(f"{source}: RoPE scaling of type {kind}: expected one of default, {', '.join(required)}")
    missing = [key for key in required[kind] if rope.get(key) is None]
    if missing:
        raise UserError(f"{source}: RoPE scaling of type {kind}: {', '.join(missing)} is missing")
    scaling: dict[str, Any] = {"type": kind, "factor": float(rope["factor"])}
    if kind in ("yarn", "llama3"):
        scaling["original_context"] = int(rope.get("original_max_position_embeddings") or context)
    if kind == "llama3":
        scaling |= {key: float(rope[key]) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        scaling |= {
            "attention_factor": _attention_factor(rope),
            "beta_fast": float(rope.get("beta_fast") or 32),
            "beta_slow": float(rope.get("beta_slow") or 1),
            "truncate": rope.get("truncate", True),
        }
    try:
        return RopeScaling(**scaling)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _attention_factor(rope: dict[str, Any]) -> float:
    """What YaRN multiplies queries and keys by (Peng et al., 2023; `mscale` as in DeepSeek-V3)."""

    def scale(by: float) -> float:
        return 0.1 * by * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


def _window(family: Family, values: dict[str, Any], context: int, source: str) -> int | None:
    """The sliding window of all layers; None where they see everything."""
    window = values.get("sliding_window")
    if not family.can(families.WINDOW) or window is None or window >= context:
        return None
    if not family.window_switch:
        return window
    if not values.get("use_sliding_window"):
        return None
    layers, first = values["num_hidden_layers"], values.get("max_window_layers", 0)
    kinds = values.get("layer_types")
    if kinds is not None:
        sliding = [kind == _SLIDING for kind in kinds]
    elif family.name == "qwen2_moe":
        sliding = [number < first and number % 2 == 0 for number in range(layers)]
    else:
        sliding = [number >= first for number in range(layers)]
    if any(sliding) and not all(sliding):
        raise UserError(
            f"{source}: sliding_window = {window} in {sum(sliding)} of {len(sliding)} layers; expected all or none"
        )
    return window if any(sliding) else None


def _leading_dense_layers(values: dict[str, Any], source: str) -> int:
    dense, step = values.get("mlp_only_layers"), values.get("decoder_sparse_step", 1)
    if dense is None and step == 1:
        return values.get("first_k_dense_replace") or 0
    dense = dense or []
    if sorted(dense) != list(range(len(dense))) or step != 1:
        raise UserError(
            f"{source}: mlp_only_layers = {dense} with decoder_sparse_step = {step}; "
            "only dense layers before all MoE layers are supported"
        )
    return len(dense)


def _refuse_unsupported(family: Family, values: dict[str, Any], source: str) -> None:
    """Raises on what would silently change the logits if it were ignored."""
    unsupported = ["mlp_bias", "clip_qkv"]
    if family.biases == ("none",):
        unsupported += ["attention_bias", "qkv_bias"]
    problems = [f"{key} = {values[key]} (not supported in {family.name})" for key in unsupported if values.get(key)]
    if values.get("partial_rotary_factor", 1) != 1:
        problems.append(f"partial_rotary_factor = {values['partial_rotary_factor']} (only whole heads are rotated)")
    if values["hidden_act"] not in ("silu", "swish"):
        problems.append(f"hidden_act = {values['hidden_act']} (only silu is supported)")
    if problems:
        raise UserError(f"{source}: " + "; ".join(problems))
