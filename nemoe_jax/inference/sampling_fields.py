"""Sampling parameters from text and JSON, and presets."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nemoe_jax.errors import UserError
from nemoe_jax.inference.sampling import PRESETS, SamplingParams

SAMPLING_FIELDS = {
    "temperature": "0 takes the likeliest token; NeMo's makers advise 0.3",
    "top_k": "choose among so many of the likeliest tokens; 0: all",
    "top_p": "choose among the likeliest tokens that together reach this probability (0 to 1)",
    "min_p": "drop tokens below this share of the likeliest (0 to 1)",
    "repetition_penalty": "above 1: tokens of the prompt and the answer become less likely (a factor)",
    "presence_penalty": "subtracted from the logits of tokens that the answer holds",
    "frequency_penalty": "subtracted once for each time that the answer holds the token",
    "logit_bias": "added to a token's logit: its id and a number; may be given several times",
    "seed": "seed of the sampling",
}


_PLAIN = SamplingParams()
_KINDS: dict[str, Any] = {name: type(value) for name, value in vars(_PLAIN).items()}


def preset(name: str | None) -> SamplingParams:
    """A preset by name; None is the plain defaults. Raises UserError on an unknown one."""
    if name is None:
        return _PLAIN
    if name not in PRESETS:
        raise UserError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r:.80}")
    return PRESETS[name]


def from_text(base: SamplingParams, name: str, text: str) -> SamplingParams:
    """`base` with one field changed, as `temperature` and `0.7`; biases as `5=-100,7=2`. Raises UserError."""
    if name not in _KINDS:
        raise UserError(f"{name}: no such setting; expected one of {', '.join(_KINDS)}")
    kind = _KINDS[name]
    if kind is tuple:
        return dataclasses.replace(base, logit_bias=tuple(_bias(pair) for pair in text.split(",") if pair.strip()))
    try:
        value = kind(text)
    except ValueError as error:
        raise UserError(f"{name}: expected a number, got {text!r:.80}") from error
    return dataclasses.replace(base, **{name: value})


def from_fields(base: SamplingParams, fields: Mapping[str, Any]) -> SamplingParams:
    """`base` with the fields of a JSON object: `preset`, and any field; biases as `{"5": -100}`. Raises UserError."""
    if "preset" in fields:
        base = dataclasses.replace(preset(fields["preset"]), seed=base.seed)
    given = {name: fields[name] for name in _KINDS if fields.get(name) is not None}
    biases = given.get("logit_bias")
    if isinstance(biases, Mapping):
        given["logit_bias"] = tuple(_bias(f"{token}={bias}") for token, bias in biases.items())
    return dataclasses.replace(base, **given)


def as_fields(sampling: SamplingParams) -> dict[str, Any]:
    """The fields by name, biases as `5=-100,7=2`, for people to read."""
    values = dataclasses.asdict(sampling)
    return values | {"logit_bias": ",".join(f"{token}={bias:g}" for token, bias in sampling.logit_bias) or "none"}


def _bias(pair: str) -> tuple[int, float]:
    token, _, bias = pair.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise UserError(f"logit_bias: expected TOKEN=BIAS, such as 5=-100, got {pair!r:.80}") from error
