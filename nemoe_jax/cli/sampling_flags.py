"""The wishes of a `Sampling` as flags, as settings of a chat and as fields of a JSON line.

A preset is taken first; whatever is said explicitly wins over it.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from nemoe_jax.errors import UserError
from nemoe_jax.inference.sampling import PRESETS, Sampling

WISHES = {
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
_PLAIN = Sampling()
_KINDS: dict[str, Any] = {name: type(value) for name, value in vars(_PLAIN).items()}


def add_flags(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """A flag for each wish, and `--preset`; `default` is the preset that is taken where none is given."""
    names = ", ".join(PRESETS)
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default=default,
        help=f"wishes to start from ({names}; default {default or 'none of them'}); explicit flags win over it",
    )
    for name, kind in _KINDS.items():
        flag, known = "--" + name.replace("_", "-"), getattr(_PLAIN, name)
        if kind is tuple:
            parser.add_argument(flag, metavar="TOKEN=BIAS", action="append", help=WISHES[name])
        else:
            words = WISHES[name] if default else f"{WISHES[name]} (default {known})"
            parser.add_argument(flag, metavar=kind.__name__.upper(), type=kind, help=words)


def from_flags(arguments: argparse.Namespace) -> Sampling:
    """What the flags of `add_flags` say. Raises UserError on values that make no sense."""
    given = {name: getattr(arguments, name) for name in _KINDS if getattr(arguments, name) is not None}
    if arguments.logit_bias:
        given["logit_bias"] = tuple(_bias(pair) for pair in arguments.logit_bias)
    return dataclasses.replace(preset(arguments.preset), **given)


def preset(name: str | None) -> Sampling:
    """A preset by name; None is the plain defaults. Raises UserError on an unknown one."""
    if name is None:
        return _PLAIN
    if name not in PRESETS:
        raise UserError(f"preset: wanted one of {', '.join(PRESETS)}, got {name!r:.80}")
    return PRESETS[name]


def from_text(base: Sampling, name: str, text: str) -> Sampling:
    """`base` with one wish changed, as `temperature` and `0.7`; biases as `5=-100,7=2`. Raises UserError."""
    if name not in _KINDS:
        raise UserError(f"{name}: no such setting; wanted one of {', '.join(_KINDS)}")
    kind = _KINDS[name]
    if kind is tuple:
        return dataclasses.replace(base, logit_bias=tuple(_bias(pair) for pair in text.split(",") if pair.strip()))
    try:
        value = kind(text)
    except ValueError as error:
        raise UserError(f"{name}: wanted a number, got {text!r:.80}") from error
    return dataclasses.replace(base, **{name: value})


def from_fields(base: Sampling, fields: Mapping[str, Any]) -> Sampling:
    """`base` with the wishes of a JSON object: `preset`, and any field; biases as `{"5": -100}`. Raises UserError."""
    if "preset" in fields:
        base = dataclasses.replace(preset(fields["preset"]), seed=base.seed)
    wishes = {name: fields[name] for name in _KINDS if fields.get(name) is not None}
    biases = wishes.get("logit_bias")
    if isinstance(biases, Mapping):
        wishes["logit_bias"] = tuple(_bias(f"{token}={bias}") for token, bias in biases.items())
    return dataclasses.replace(base, **wishes)


def as_fields(sampling: Sampling) -> dict[str, Any]:
    """The wishes by name, biases as `5=-100,7=2`, for people to read."""
    values = dataclasses.asdict(sampling)
    return values | {"logit_bias": ",".join(f"{token}={bias:g}" for token, bias in sampling.logit_bias) or "none"}


def _bias(pair: str) -> tuple[int, float]:
    token, _, bias = pair.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise UserError(f"logit_bias: wanted TOKEN=BIAS, such as 5=-100, got {pair!r:.80}") from error
