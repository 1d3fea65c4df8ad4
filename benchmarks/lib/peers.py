"""What benchmarks of a model beside a peer share: flags, opening the model, and the limits of their ratios."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from benchmarks.lib.results import add_keep, keep, machine


def parser(description: str | None, turns: int) -> argparse.ArgumentParser:
    """A command line of a model directory, `--turns`, `--cpu` and `--keep`."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("directory", help="a model directory")
    result.add_argument("--turns", type=int, default=turns, help=f"turns of each; the best counts (default {turns})")
    about = "count this process's CPU seconds, not the time that passes: for a machine that does other work as well"
    result.add_argument("--cpu", action="store_true", help=about)
    add_keep(result)
    return result


def clock(options: argparse.Namespace) -> Callable[[], float]:
    """What tells seconds: the time that passes, or with `--cpu` that of this process."""
    return time.process_time if options.cpu else time.perf_counter


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
    unit = unit.replace("second", "CPU second") if options.cpu else unit
    for what, value in figures.items():
        print(f"{what:44}{value:10.2f} {unit}")
    for what, ratio in ratios.items():
        print(f"{what:44}{ratio:10.2f}" + (f" (limit {limits[what]})" if what in limits else ""))
    for what, value in more.items():
        print(f"{what.replace('_', ' '):44}{value}")
    if options.keep:
        keep(f"{name}-{jax.default_backend()}", {**machine(), unit: dict(figures), "ratios": dict(ratios), **more})
    sys.exit(any(ratios[what] < limit for what, limit in limits.items()))
