"""adapter_config.json of Hugging Face PEFT: which kind of adapter a directory holds, and the sizes of its updates."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from nemoe_jax.errors import UserError

CONFIG = "adapter_config.json"

# what changes the weights in ways other than a low-rank sum
_REFUSED = (
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
_LARGEST_ALPHA = 1e30  # what float32 can hold; NaN is not below it
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base weights as well


class AdapterConfig(NamedTuple):
    """What adapter_config.json says about the size of updates."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool  # scale alpha / √r (Kalajdzievski 2023) instead of alpha / r
    parameters: tuple[str, ...]  # targets named as parameters rather than as modules
    ties: bool  # embedding and head were adapted as one
    dropout: float  # of the adapters' inputs, in training
    tokens: dict[str, tuple[int, ...]]  # {end of a module's name: rows that were trained as they are}

    def rank_of(self, name: str) -> int:
        """The rank of the update of a module or parameter."""
        return _lookup(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """The factor of B A."""
        rank = self.rank_of(name)
        return _lookup(self.alpha_pattern, name, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def name_of(self, module: str) -> str:
        """What patterns are matched against: the parameter where that was the target, else the module."""
        parameter = f".{module}.weight"
        return parameter[1:] if any(parameter.endswith(f".{target}") for target in self.parameters) else module


def _lookup(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a dotted name."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(type(row) is int and row >= 0 for row in value)


def read_config(directory: Path) -> AdapterConfig:
    """Reads adapter_config.json.

    Raises:
        UserError: no adapter directory, or a kind of adapter that a low-rank sum does not describe.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory}: not a PEFT adapter directory: no {CONFIG}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a JSON object ({error})") from error
    if kind != "LORA":
        raise UserError(f"{path}: peft_type: expected LORA, got {kind}")
    problems = [f"{key} = {content[key]} is not supported" for key in _REFUSED if content.get(key)]
    tokens = content.get("trainable_token_indices") or {}
    if isinstance(tokens, list):
        tokens = {"embed_tokens": tokens}
    if not isinstance(tokens, dict) or not all(map(_are_rows, tokens.values())):
        raise UserError(f"{path}: trainable_token_indices: expected lists of token ids, got {tokens}")
    if content.get("init_lora_weights") not in _PLAIN_INITS:
        problems.append(
            f"init_lora_weights = {content['init_lora_weights']} changed the base model's weights; "
            "convert the adapter to a plain LoRA with PEFT first"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(content.get(key) or {}, dict):
            raise UserError(f"{path}: {key}: expected an object, got {content[key]}")
    if not isinstance(content.get("target_parameters") or [], list):
        raise UserError(f"{path}: target_parameters: expected a list, got {content['target_parameters']}")
    config = AdapterConfig(
        rank=content.get("r", 8),
        alpha=content.get("lora_alpha", 8),
        rank_pattern=content.get("rank_pattern") or {},
        alpha_pattern=content.get("alpha_pattern") or {},
        rslora=bool(content.get("use_rslora")),
        parameters=tuple(content.get("target_parameters") or ()),
        ties=bool(content.get("ensure_weight_tying")),
        dropout=content.get("lora_dropout") or 0.0,
        tokens={name: tuple(rows) for name, rows in tokens.items()},
    )
    if type(config.dropout) not in (int, float):
        problems.append(f"lora_dropout: expected a number, got {config.dropout}")
    for rank in (config.rank, *config.rank_pattern.values()):
        if type(rank) is not int or rank < 1:
            problems.append(f"r and rank_pattern: expected positive integers, got {rank}")
    for alpha in (config.alpha, *config.alpha_pattern.values()):
        if type(alpha) not in (int, float) or not abs(alpha) <= _LARGEST_ALPHA:
            problems.append(f"lora_alpha and alpha_pattern: expected numbers, got {alpha}")
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"rank_pattern and alpha_pattern: expected regular expressions, got {pattern} ({error})")
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    return config
