"""Sampling parameters as flags.

A preset is taken first, then what the model's generation_config.json says; explicit flags win over both, and so does a
preset that is asked for over the file.
"""

import argparse
import dataclasses

from nemoe_jax.inference.generation_config import GenerationConfig
from nemoe_jax.inference.sampling import PRESETS, SamplingParams
from nemoe_jax.inference.sampling_fields import _KINDS, _PLAIN, SAMPLING_FIELDS, _bias, preset
from nemoe_jax.utils.command import rename_flags


def add_preset_flag(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """`--sampling-preset`; `default` is the preset that is taken where none is given."""
    parser.add_argument(
        "--sampling-preset",
        choices=tuple(PRESETS),
        help=f"sampling parameters to start from ({', '.join(PRESETS)}; default {default or 'none of them'}, with what "
        "the model's generation_config.json says)",
    )
    rename_flags(parser, {"--preset": "--sampling-preset"})
    parser.set_defaults(default_preset=default)


def add_flags(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """A flag for each sampling parameter, and `--sampling-preset`."""
    add_preset_flag(parser, default)
    for name, kind in _KINDS.items():
        flag, known = "--" + name.replace("_", "-"), getattr(_PLAIN, name)
        if kind is tuple:
            parser.add_argument(flag, metavar="TOKEN=BIAS", action="append", help=SAMPLING_FIELDS[name])
        else:
            words = SAMPLING_FIELDS[name] if default else f"{SAMPLING_FIELDS[name]} (default {known})"
            parser.add_argument(flag, metavar=kind.__name__.upper(), type=kind, help=words)


def from_flags(arguments: argparse.Namespace, generation: GenerationConfig | None = None) -> SamplingParams:
    """The sampling parameters that the flags of `add_flags`, and a model's generation config, give.

    Raises:
        UserError: values out of their range.
    """
    sampling = preset(arguments.sampling_preset or arguments.default_preset)
    if generation is not None:
        sampling = dataclasses.replace(sampling, **generation.sampling)
    given = {name: getattr(arguments, name) for name in given_names(arguments)}
    if "logit_bias" in given:
        given["logit_bias"] = tuple(_bias(pair) for pair in given["logit_bias"])
    return dataclasses.replace(sampling, **given)


def given_names(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The sampling parameters that were given as flags."""
    return tuple(name for name in _KINDS if getattr(arguments, name, None) not in (None, []))
