"""Sampling parameters of one request, and presets of them.

Nothing here needs JAX: commands read it to explain themselves. sampler.py applies them.
"""

import dataclasses
import math
from collections.abc import Callable
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, NamedTuple

from nemoe_jax.errors import UserError, listed

MAX_BIASES = 300  # entries of a logit_bias, as with OpenAI
_SHOWN = 60  # characters of a wrong value


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request; the defaults change nothing, and temperature 0 is greedy.

    temperature: the logits are divided by it.
    top_k: only so many of the likeliest tokens remain; 0: all.
    top_p: only the likeliest tokens that have this probability together (Holtzman et al., 2020).
    min_p: only tokens at least this share as likely as the likeliest (Nguyen et al., 2024).
    repetition_penalty: logits of tokens in the prompt or the answer are divided by it where positive, multiplied where
        negative (Keskar et al., 2019).
    presence_penalty: taken once from the logits of tokens that are in the answer, as OpenAI's API defines it.
    frequency_penalty: taken as often as the token is in the answer, as OpenAI's API defines it.
    logit_bias: pairs of a token and what is added to its logit.
    seed: the same seed gives the same answer to the same prompt.

    Raises:
        UserError: a value out of its range, or of another kind; all of them are named.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    def __post_init__(self):
        problems = [
            f"{name}: expected {allowed.words}, got {_short(getattr(self, name))}"
            for name, allowed in _RANGES.items()
            if not allowed.fits(getattr(self, name))
        ]
        if problems:
            raise UserError(listed(problems))

    def check(self, vocab: int) -> None:
        """Raises UserError where `logit_bias` names a token that a vocabulary of that size lacks."""
        wrong = [token for token, _ in self.logit_bias if token >= vocab]
        if wrong:
            raise UserError(f"logit_bias: expected tokens from 0 to {vocab - 1}, got {wrong[0]}")


class _Range(NamedTuple):
    """A field's values."""

    words: str
    fits: Callable[[Any], bool]


def _number(low: float, high: float) -> _Range:
    return _Range(f"a number from {low:g} to {high:g}", lambda value: _is_number(value) and low <= value <= high)


def _whole(low: int, high: int, words: str) -> _Range:
    return _Range(words, lambda value: _is_whole(value) and low <= value <= high)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_bias(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= MAX_BIASES and all(map(_is_entry, value))


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and _is_whole(value[0])
        and value[0] >= 0
        and _is_number(value[1])
        and abs(value[1]) <= 100
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(value)} entries)"


_RANGES = {
    "temperature": _number(0, 100),
    "top_k": _whole(0, 2**31 - 1, "a whole number, 0 (all) or more"),
    "top_p": _number(0, 1),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _Range(f"up to {MAX_BIASES} pairs of a token id and a number from -100 to 100", _is_bias),
    "seed": _whole(-(2**63), 2**64 - 1, "a whole number of 64 bits"),
}

# Mistral-Nemo-Instruct-2407's model card recommends temperature 0.3. The others are from the middle of what
# Mistral-NeMoE-12B-16E's card gives for each use: 0.3 to 0.5, 0.5 to 0.7 and 0.7 to 0.9; min-p 0.1 always, and
# repetition penalties of 1.15, 1.15 to 1.18 and 1.18.
PRESETS = MappingProxyType(
    {
        "nemo": SamplingParams(temperature=0.3),
        "factual": SamplingParams(temperature=0.4, min_p=0.1, repetition_penalty=1.15),
        "roleplay": SamplingParams(temperature=0.6, min_p=0.1, repetition_penalty=1.17),
        "creative": SamplingParams(temperature=0.8, min_p=0.1, repetition_penalty=1.18),
    }
)
