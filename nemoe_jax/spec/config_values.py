"""What the values in a model's config file must be, checked before anything is computed with them.

A value of the wrong kind (a string for a number, NaN, a list) is named here, by its key in the file. Whether the
numbers make a model is for `ModelConfig` to say.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nemoe_jax.errors import UserError

_LARGEST = 1e300


class Kind(NamedTuple):
    """A kind of JSON value."""

    words: str
    fits: Callable[[Any], bool]


_WHOLE = Kind("an integer", lambda value: type(value) is int)
_NUMBER = Kind("a finite number", lambda value: type(value) in (int, float) and abs(value) < _LARGEST)
_FLAG = Kind("true or false", lambda value: type(value) is bool)
# printable: what is quoted in a message stays on its line
_TEXT = Kind("a string", lambda value: isinstance(value, str) and value.isprintable())
_TABLE = Kind("an object", lambda value: isinstance(value, dict))
_TEXTS = Kind("a list of strings", lambda value: isinstance(value, list) and all(map(_TEXT.fits, value)))
_WHOLES = Kind("a list of integers", lambda value: isinstance(value, list) and all(map(_WHOLE.fits, value)))
_TOKENS = Kind("a token id, or a list of them", lambda value: _WHOLE.fits(value) or _WHOLES.fits(value))

# The keys of config.json that are read, by their kind.
_KEYS = {
    _WHOLE: "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size "
    "max_position_embeddings sliding_window intermediate_size num_local_experts num_experts num_experts_per_tok "
    "moe_intermediate_size shared_expert_intermediate_size first_k_dense_replace decoder_sparse_step bos_token_id "
    "max_window_layers",
    _NUMBER: "rope_theta rms_norm_eps clip_qkv partial_rotary_factor",
    _FLAG: "tie_word_embeddings norm_topk_prob qk_norm attention_bias qkv_bias mlp_bias use_sliding_window",
    _TEXT: "dtype torch_dtype hidden_act model_type",
    _TABLE: "rope_parameters rope_scaling text_config",
    _TEXTS: "architectures layer_types",
    _WHOLES: "mlp_only_layers",
    _TOKENS: "eos_token_id",
}
HUGGING_FACE = {key: kind for kind, keys in _KEYS.items() for key in keys.split()}
_ROPE_KEYS = {
    _NUMBER: "rope_theta factor low_freq_factor high_freq_factor original_max_position_embeddings attention_factor "
    "beta_fast beta_slow mscale mscale_all_dim",
    _TEXT: "rope_type type",
    _FLAG: "truncate",
}
ROPE = {key: kind for kind, keys in _ROPE_KEYS.items() for key in keys.split()}
MOE = {"moe": _TABLE}


def given(content: Any, source: str, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The values that a config file gives (null is as good as absent), once those among `kinds` are of their kind.

    Raises:
        UserError: not a JSON object, or values of another kind; all of them are named.
    """
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected a JSON object, got a {type(content).__name__}")
    values = {key: value for key, value in content.items() if value is not None}
    problems = [
        f"{key}: expected {kinds[key].words}, got {_short(value)}"
        for key, value in values.items()
        if key in kinds and not kinds[key].fits(value)
    ]
    if problems:
        raise UserError(f"{source}: " + "; ".join(problems))
    return values


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
