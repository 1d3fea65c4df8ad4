"""What the demos share: running public commands, and a model's row in the report."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nemoe_jax.spec.schema import count

MODULES = {"nemoe": "nemoe_jax.cli.main", "nemoe-convert": "convert.cli", "nemoe-train": "train.cli"}
COLUMNS = {
    "loss": "loss",
    "gap": "above dense",
    "kl": "KL to dense",
    "agreement": "agreement",
    "accuracy": "accuracy",
    "load_max_over_mean": "load max/mean",
    "params_total": "parameters",
    "params_active": "active",
    "seconds": "seconds",
}


class Steps:
    """Runs commands and adds up the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, *command: str) -> dict[str, Any]:
        """The figures of a command; its seconds count for a stage."""
        (figures,) = self.lines(stage, *command)
        _show(figures)
        return figures

    def lines(self, stage: str, *command: str) -> list[dict[str, Any]]:
        """The lines of a command's JSON; its seconds count for a stage."""
        before = time.monotonic()
        lines = run(*command)
        self.seconds[stage] = self.seconds.get(stage, 0) + time.monotonic() - before
        return lines

    def measure(self, models: dict[str, Path], held_out: Path, *windows: str) -> dict[str, dict[str, Any]]:
        """The figures of models, by name, beside the first one; each one's seconds count for its stage."""
        first, *others = map(str, models.values())
        lines = run("nemoe", "perplexity", first, str(held_out), *windows, "--reference", first, "--also", *others)
        measured = dict(zip(models, lines, strict=True))
        for name, figures in measured.items():
            self.seconds[name] += figures["seconds"]
            _show(figures)
        return measured


def _show(figures: dict[str, Any]) -> None:
    shown = {name: value for name, value in figures.items() if isinstance(value, (int, float, str)) and name != "text"}
    words = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items())
    print(", ".join(words), flush=True)


def run(*command: str) -> list[dict[str, Any]]:
    """Prints a public command, runs it, and returns the lines of its `--json`."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    program = [sys.executable, "-m", MODULES[command[0]], *command[1:], "--json"]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return [json.loads(line) for line in done.stdout.splitlines()]


def row(directory: Path, measured: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A model's row of the report.

    Args:
        measured: of `nemoe perplexity`, with the dense model as its reference.
    """
    from nemoe_jax.checkpoints.reader import read_config

    total, active = count(read_config(directory))
    return {
        "loss": measured["loss"],
        "gap": measured["loss_above_reference"],
        "kl": measured["kl_divergence"],
        "agreement": measured["argmax_agreement"],
        "accuracy": measured["accuracy"],
        "load_max_over_mean": measured.get("load_max_over_mean"),
        "params_total": total,
        "params_active": active,
        "seconds": seconds,
        "model_dir": str(directory),
        "destroyed": measured["destroyed"],
    }


def print_table(report: dict[str, Any], output: Path) -> None:
    """The stages side by side, the samples, and where the report is."""
    stages = [name for name, figures in report.items() if isinstance(figures, dict) and "loss" in figures]
    print(f"\n{'':16}" + "".join(f"{title:>14}" for title in COLUMNS.values()))
    for name in stages:
        values = [report[name][column] for column in COLUMNS]
        cells = ["-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.3f}" for v in values]
        print(f"{name:16}" + "".join(f"{cell:>14}" for cell in cells))
    for name in stages:
        if report[name]["destroyed"]:
            print(f"{name}: destroyed; its loss is above {report['loss_unigram']:.2f}, the unigram model's")
    for name, sample in report["samples"].items():
        print(f"\n--- {name} continues {report['prompt']!r}:\n{sample}")
    for name, reply in report.get("chat", {}).items():
        print(f"\n--- {name} is asked {report['question']!r}:\n{reply}")
    print(f"\n{report['seconds']:.0f} s in all; report: {output / 'report.html'}")
