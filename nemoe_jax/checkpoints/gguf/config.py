"""config.json and generation_config.json of a GGUF model, from its metadata.

llama.cpp keeps the rope scaling of Llama 3 not as the four numbers of config.json but as what they make of each
frequency, in the tensor `rope_freqs.weight`; the numbers are found again from it.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from nemoe_jax.checkpoints.gguf.header import GgufHeader
from nemoe_jax.errors import UserError
from nemoe_jax.spec.families import EXPERTS, FAMILIES, Family

ROPE_FREQS = "rope_freqs.weight"
DTYPES = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}
QUANTIZED = "bfloat16"  # what the values of a quantized file are kept in


_ALIASES = {"mistral3": "llama"}  # the same tensors under another name
# {key of the metadata: value that changes nothing}; parts of other models
_NEUTRAL = {
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": 0,
    "attention.temperature_scale": 0,
    "embedding_scale": 1,
    "residual_scale": 1,
    "logit_scale": 1,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
}
_ENDS = ("eos", "eot", "eom")
# control tokens that end a response wherever a vocabulary has them, as in llama.cpp
_NAMED_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>")


def family_of(header: GgufHeader) -> Family:
    """The family of a GGUF model. Raises UserError where there is none."""
    metadata = header.metadata
    architecture = str(metadata.get("general.architecture"))
    sparse = bool(metadata.get(f"{architecture}.expert_count"))
    gguf = _ALIASES.get(architecture, architecture)
    able = [family for family in FAMILIES.values() if family.gguf is not None and family.gguf == gguf]
    fitting = [family for family in able if (EXPERTS in family.always) == sparse]
    if not able:
        known = ", ".join(sorted({*(family.gguf for family in FAMILIES.values() if family.gguf), *_ALIASES}))
        raise UserError(f"{header.paths[0]}: unknown GGUF architecture {architecture!r}; known: {known}")
    if not fitting:
        raise UserError(f"{header.paths[0]}: {architecture} {'with' if sparse else 'without'} experts is not supported")
    named = f"{architecture} {metadata.get('general.name', '')}".lower()  # llama.cpp makes no difference
    return next((family for family in fitting if family.name in named), fitting[-1])


def config_json(header: GgufHeader) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        UserError: an unknown architecture, metadata that is missing or of the wrong kind, or a feature that no
            config.json of this architecture says.
    """
    family, keys = family_of(header), _Keys(header)
    keys.refuse(_NEUTRAL)
    heads = keys.whole("attention.head_count")
    hidden = keys.whole("embedding_length")
    head_dim = keys.whole("attention.key_length", hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.whole(key, head_dim) != head_dim:
            raise UserError(f"{keys.source}: {keys.named(key)}: expected the key length {head_dim}")
    if "token_embd.weight" not in header.tensors:
        raise UserError(f"{keys.source}: no tensor token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "hidden_act": "silu",
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length", 0),
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "sliding_window": keys.whole("attention.sliding_window", 0) or None,
        "torch_dtype": dtype_of(header),
    }
    if config["num_hidden_layers"] > len(header.tensors):
        raise UserError(
            f"{keys.source}: {keys.named('block_count')} = {config['num_hidden_layers']}, but the file has "
            f"{len(header.tensors)} tensors"
        )
    if len(family.biases) > 1:
        config[family.bias_key] = "blk.0.attn_q.bias" in header.tensors
    if family.window_switch:
        config["use_sliding_window"] = config["sliding_window"] is not None
    if EXPERTS in family.always:
        config |= _moe(keys, family)
    config |= _rope(header, keys, head_dim)
    ids = token_ids(header)
    return config | {"bos_token_id": ids.get("bos"), "eos_token_id": ids.get("eos")}


def _moe(keys: "_Keys", family: Family) -> dict[str, Any]:
    fields = family.fields
    config: dict[str, Any] = {
        fields["experts"]: keys.whole("expert_count"),
        fields["top_k"]: keys.whole("expert_used_count"),
        fields["expert_ffn"]: keys.whole("expert_feed_forward_length", keys.whole("feed_forward_length", 0)),
    }
    if "normalize_top_k" in fields:  # what llama.cpp computes, whatever the model was trained with
        config[fields["normalize_top_k"]] = bool(family.gguf_normalizes)
    if "shared_ffn" in fields:
        config[fields["shared_ffn"]] = keys.whole("expert_shared_feed_forward_length")
    if "dense_layers" in fields:
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return config


def _rope(header: GgufHeader, keys: "_Keys", head_dim: int) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, and `rope_parameters`, which says both in transformers 5."""
    theta = keys.number("rope.freq_base", 10000.0)
    kind = keys.text("rope.scaling.type", "none")
    scaling: dict[str, Any] | None = None
    if ROPE_FREQS in header.tensors:
        scaling = _llama3_scaling(header, keys, theta, head_dim)
    elif kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = keys.whole("rope.scaling.original_context_length")
            for key in ("beta_fast", "beta_slow"):
                if (value := keys.number(f"rope.scaling.yarn_{key}", None)) is not None:
                    scaling[key] = value
            for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
                if (value := keys.number(key, None)) is not None:
                    scaling["attention_factor"] = value * yarn_attention_factor(scaling["factor"])
            keys.refuse({"rope.scaling.yarn_log_multiplier": 0})
    elif kind != "none":
        raise UserError(f"{keys.source}: {keys.named('rope.scaling.type')}: unknown type {kind!r}")
    parameters = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": parameters}


def _llama3_scaling(header: GgufHeader, keys: "_Keys", theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling whose factors are those of `rope_freqs.weight`."""
    tensor = header.tensors[ROPE_FREQS]
    if tensor.type is not GGMLQuantizationType.F32 or tensor.shape != (head_dim // 2,):
        raise UserError(f"{tensor.path}: {ROPE_FREQS}: expected F32 of shape ({head_dim // 2},), got {tensor.shape}")
    found = np.fromfile(tensor.path, "<f4", head_dim // 2, offset=tensor.offset).astype(np.float64)
    if not np.isfinite(found).all() or found.min() < 0.999:
        raise UserError(f"{tensor.path}: {ROPE_FREQS}: expected factors of at least 1")
    turns = _turns(theta, head_dim)
    factor = _shortest(found.max())
    candidates = [(1.0, 4.0, 8192)]
    between = (found > 1.0001) & (found < factor * 0.9999)
    if between.sum() >= 2:  # the smooth part is a straight line over the turns
        smooth = (1 / found[between] - 1 / factor) / (1 - 1 / factor)
        slope, intercept = np.polyfit(turns[between], smooth, 1)
        original = -slope / intercept  # with a low factor of 1, which only scales the other two
        candidates.append((1.0, 1 - 1 / intercept, round(original)))
    for low, high, original in candidates:
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": round(high, 6),
            "original_max_position_embeddings": original,
        }
        if np.allclose(llama3_factors(theta, head_dim, scaling), found, rtol=1e-3):
            return scaling
    raise UserError(f"{tensor.path}: {ROPE_FREQS}: no scaling of Llama 3's form has these factors")


def _turns(theta: float, head_dim: int) -> np.ndarray:
    """Of each pair of a head's dimensions, how far it turns with one token: 1/wavelength."""
    return 1 / (2 * np.pi * theta ** (2 * np.arange(head_dim // 2) / head_dim))


def llama3_factors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """What Llama 3's scaling divides each frequency by: `rope_freqs.weight`."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * _turns(theta, head_dim)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def yarn_attention_factor(factor: float) -> float:
    """What YaRN multiplies cosine and sine by where nothing else is said."""
    return 0.1 * math.log(factor) + 1


def dtype_of(header: GgufHeader) -> str:
    """The dtype of most elements; that of a quantized file is bfloat16."""
    sizes: dict[str, int] = {}
    for tensor in header.tensors.values():
        name = DTYPES.get(tensor.type, QUANTIZED)
        sizes[name] = sizes.get(name, 0) + math.prod(tensor.shape)
    return max(sizes, key=sizes.__getitem__, default="float32")


def token_ids(header: GgufHeader) -> dict[str, int]:
    """{bos, eos, eot, eom, unknown, padding, …: id}; the defaults of a SentencePiece vocabulary are llama.cpp's."""
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    default = {"bos": 1, "eos": 2, "unknown": 0} if header.metadata.get("tokenizer.ggml.model") == "llama" else {}
    ids = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        token = header.metadata.get(key, default.get(name))
        if token is None or token in (-1, 0xFFFFFFFF):
            continue
        if type(token) is not int or not 0 <= token < len(tokens):
            raise UserError(f"{header.paths[0]}: {key}: expected a token id below {len(tokens)}, got {token!r}")
        ids[name] = token
    return ids


def generation_config_json(header: GgufHeader) -> dict[str, Any]:
    """The content of generation_config.json: every token that ends a response, and the sampling that the file wants."""
    ids = token_ids(header)
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    types = header.metadata.get("tokenizer.ggml.token_type", [])
    ends = [ids[name] for name in _ENDS if name in ids]
    ends += [i for i, (text, kind) in enumerate(zip(tokens, types, strict=False)) if kind == 3 and text in _NAMED_ENDS]
    ends = list(dict.fromkeys(ends))
    content: dict[str, Any] = {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": ids.get("padding"),
    }
    sampling = {
        name: value
        for key, name in {
            "temp": "temperature",
            "top_k": "top_k",
            "top_p": "top_p",
            "min_p": "min_p",
            "penalty_repeat": "repetition_penalty",
        }.items()
        if (value := _sampling(header, key)) is not None
    }
    content |= {"do_sample": True, **sampling} if sampling else {}
    return {name: value for name, value in content.items() if value is not None}


def _sampling(header: GgufHeader, key: str) -> float | None:
    value = header.metadata.get(f"general.sampling.{key}")
    return _shortest(value) if isinstance(value, int | float) and math.isfinite(value) else None


class _Keys:
    """The metadata of an architecture, checked value by value."""

    def __init__(self, header: GgufHeader):
        self.source = str(header.paths[0])
        self.architecture = header.metadata["general.architecture"]
        self._metadata = header.metadata

    def named(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _value(self, key: str, default: Any) -> Any:
        value = self._metadata.get(self.named(key), default)
        if value is ...:
            raise UserError(f"{self.source}: {self.named(key)} is missing")
        if isinstance(value, np.ndarray):  # one number a layer
            if len(set(value.tolist())) != 1:
                raise UserError(f"{self.source}: {self.named(key)}: expected the same value in every layer")
            value = value[0].item()
        return value

    def whole(self, key: str, default: Any = ...) -> Any:
        value = self._value(key, default)
        if value is not default and (type(value) is not int or not 0 <= value < 2**31):
            raise UserError(f"{self.source}: {self.named(key)}: expected an integer of 0 or more, got {value!r}")
        return value

    def number(self, key: str, default: Any = ...) -> Any:
        value = self._value(key, default)
        if value is default:
            return default
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"{self.source}: {self.named(key)}: expected a finite number, got {value!r}")
        return _shortest(value)

    def text(self, key: str, default: str) -> str:
        value = self._value(key, default)
        if not isinstance(value, str) or not value.isprintable():
            raise UserError(f"{self.source}: {self.named(key)}: expected a string, got {value!r}")
        return value

    def refuse(self, neutral: Mapping[str, float]) -> None:
        """Raises on what would change the logits if it were ignored."""
        for key, value in neutral.items():
            if (found := self.number(key, value)) != value:
                raise UserError(f"{self.source}: {self.named(key)} = {found} is not supported")


def _shortest(value: float) -> Any:
    """The shortest decimal that is this float32: 1e-05, where the file's bits say 9.99999974e-06."""
    return value if isinstance(value, int) else float(str(np.float32(value)))
