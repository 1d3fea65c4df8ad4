"""The wishes of a `SamplingParams` as flags, as settings of a chat and as fields of a JSON line.

A preset is taken first; whatever is said explicitly wins over it.
"""

import argparse
import dataclasses

from nemoe_jax.inference.sampling import PRESETS, SamplingParams
from nemoe_jax.inference.sampling_fields import _KINDS, _PLAIN, SAMPLING_FIELDS, _bias, preset


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
            parser.add_argument(flag, metavar="TOKEN=BIAS", action="append", help=SAMPLING_FIELDS[name])
        else:
            words = SAMPLING_FIELDS[name] if default else f"{SAMPLING_FIELDS[name]} (default {known})"
            parser.add_argument(flag, metavar=kind.__name__.upper(), type=kind, help=words)


def from_flags(arguments: argparse.Namespace) -> SamplingParams:
    """What the flags of `add_flags` say. Raises UserError on values that make no sense."""
    given = {name: getattr(arguments, name) for name in _KINDS if getattr(arguments, name) is not None}
    if arguments.logit_bias:
        given["logit_bias"] = tuple(_bias(pair) for pair in arguments.logit_bias)
    return dataclasses.replace(preset(arguments.preset), **given)
