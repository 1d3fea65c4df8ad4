"""What benchmarks of a model beside a peer share: flags, opening the model, and the limits of their ratios."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import jax

from benchmarks.lib.results import add_keep, keep, machine


def parser(description: str | None, turns: int) -> argparse.ArgumentParser:
    """A command line of a model directory, `--turns` and `--keep`."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("directory", help="a model directory")
    result.add_argument("--turns", type=int, default=turns, help=f"turns of each; the best counts (default {turns})")
    add_keep(result)
    return result


def opened(directory: str) -> tuple[Any, Any, Any]:
    """Config, parameters and tokenizer of a model directory."""
    from nemoe_jax.checkpoints.pretrained import load_pretrained
    from nemoe_jax.text.tokenizers.load import load_tokenizer

    return *load_pretrained(directory), load_tokenizer(directory)


def judge(
    name: str,
    options: argparse.Namespace,
    figures: Mapping[str, float],
    unit: str,
    ratios: Mapping[str, float],
    limits: Mapping[str, float],
    **more: Any,
) -> None:
    """Prints figures and ratios, keeps them with `--keep`, and exits: with 1 where a ratio misses its limit."""
    for what, value in figures.items():
        print(f"{what:44}{value:10.2f} {unit}")
    for what, ratio in ratios.items():
        print(f"{what:44}{ratio:10.2f}" + (f" (limit {limits[what]})" if what in limits else ""))
    for what, value in more.items():
        print(f"{what.replace('_', ' '):44}{value}")
    if options.keep:
        keep(f"{name}-{jax.default_backend()}", {**machine(), unit: dict(figures), "ratios": dict(ratios), **more})
    sys.exit(any(ratios[what] < limit for what, limit in limits.items()))
