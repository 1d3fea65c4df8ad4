"""The main job on a small model, end to end: train dense, carve, with calibration text too, repair, measure, generate.

    make demo        (or: python -m examples.demo.demo --output runs/demo)

Every step is a public command, printed before it runs; with other directory names they are the commands for the 12B.
Text: the sources of the Python standard library. Vocabulary: the first ranks of the real Tekken.

R says how much of the damage of a careless carve is avoided: 1 - gap / reference gap, where a gap is held-out loss
above the dense model's and the reference is carved from contiguous neurons with a random orthonormal router and the
output scale of least squares. 1 is the dense model itself, 0 the reference.
"""

import argparse
import importlib.util
import json
import random
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from examples.demo.report import STAGES, write_report
from nemoe_jax.spec.hf_config import from_hf
from nemoe_jax.spec.schema import count
from nemoe_jax.text.tokenizers.load import cut_tekken

VOCABULARY = 4096
EXPERTS, TOP_K = 16, 4
CALIBRATION_TOKENS = "32768"
PROMPT = 'def read(path):\n    """Read'
MODULES = {"nemoe": "nemoe_jax.cli.main", "nemoe-convert": "convert.cli", "nemoe-train": "train.cli"}


def main() -> None:
    """Runs every step and writes report.json, report.html and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="directory to make (default runs/demo)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="key=value", help="recipe keys for the dense training (steps=1000)"
    )
    parser.add_argument("--set-repair", nargs="*", default=[], metavar="key=value", help="recipe keys for the repair")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if output.exists():
        parser.error(f"{output}: exists already; remove it or choose another --output")
    started = time.monotonic()
    text = output / "text"
    write_corpus(text, tekken_file())
    train, held_out = text / "train.jsonl", text / "held-out.jsonl"
    data = [f"data.train={train}", f"data.held_out={held_out}"]
    models = {name: output / name for name in STAGES}
    timings: dict[str, float] = {}

    def step(name: str, *command: str) -> dict[str, Any]:
        before = time.monotonic()
        figures = run(*command)
        timings[name] = timings.get(name, 0) + time.monotonic() - before
        return figures

    dense = models["dense"]
    step(
        "dense",
        "nemoe-train",
        "run",
        "nano-dense",
        f"output={dense}",
        f"tokenizer={text / 'tekken.json'}",
        *data,
        *arguments.set,
    )
    carve = ("nemoe-convert", "carve", str(dense))
    shape = ("--experts", str(EXPERTS), "--top-k", str(TOP_K))
    calibration = ("--calibration", str(train), "--calibration-tokens", CALIBRATION_TOKENS)
    careless = ("--partition", "contiguous", "--router", "random", "--no-refit")
    step("reference", *carve, str(models["reference"]), *shape, *careless, *calibration)
    step("carved", *carve, str(models["carved"]), *shape)
    step("calibrated", *carve, str(models["calibrated"]), *shape, *calibration)
    step(
        "repaired",
        "nemoe-train",
        "run",
        "nano-repair",
        f"model={models['calibrated']}",
        f"distill.teacher={dense}",
        f"output={models['repaired']}",
        *data,
        *arguments.set_repair,
    )

    # the windows that the recipes, too, evaluate on
    windows = ("--batch-size", "8", "--batches", "8")
    measured = {
        name: step(name, "nemoe", "perplexity", str(directory), str(held_out), *windows)
        for name, directory in models.items()
    }
    sampling = ("--max-new-tokens", "64", "--temperature", "0.7", "--min-p", "0.1")
    samples = {
        name: step(name, "nemoe", "generate", str(models[name]), "--prompt", PROMPT, *sampling)["text"]
        for name in ("dense", "carved", "calibrated", "repaired")
    }
    report: dict[str, Any] = {
        name: stage(directory, measured, name, timings[name]) for name, directory in models.items()
    }
    report |= {"samples": samples, "prompt": PROMPT, "seconds": time.monotonic() - started}
    write_report(output, report, measured)
    print_table(report)


def run(*command: str) -> dict[str, Any]:
    """Prints a public command, runs it, and returns the figures of its `--json`."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    program = [sys.executable, "-m", MODULES[command[0]], *command[1:], "--json"]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    figures = json.loads(done.stdout)
    shown = {name: value for name, value in figures.items() if isinstance(value, (int, float, str)) and name != "text"}
    print(
        ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
        )
    )
    return figures


def stage(directory: Path, measured: dict[str, dict[str, Any]], name: str, seconds: float) -> dict[str, Any]:
    """A model's row of the report."""
    total, active = count(from_hf(json.loads((directory / "config.json").read_text(encoding="utf-8"))))
    loss, dense, reference = (measured[key]["loss"] for key in (name, "dense", "reference"))
    return {
        "loss": loss,
        "perplexity": measured[name]["perplexity"],
        "r": 1 - (loss - dense) / (reference - dense),
        "load_max_over_mean": measured[name].get("load_max_over_mean"),
        "params_total": total,
        "params_active": active,
        "seconds": seconds,
        "model_dir": str(directory),
    }


def tekken_file() -> Path:
    """The real Tekken vocabulary, which comes with mistral-common."""
    package = importlib.util.find_spec("mistral_common")
    if package is None or package.origin is None:
        sys.exit("the Tekken vocabulary comes with mistral-common: pip install 'nemoe-jax[demo]'")
    return Path(package.origin).parent / "data" / "tekken_240718.json"


def write_corpus(directory: Path, tekken: Path) -> None:
    """The standard library's sources as train.jsonl and, of every twentieth file, held-out.jsonl; and a cut Tekken."""
    directory.mkdir(parents=True)
    cut_tekken(tekken, directory / "tekken.json", VOCABULARY)
    root = Path(sysconfig.get_paths()["stdlib"])
    # tables of character codes, and files of hundreds of kilobytes, are little like text
    sources = [
        path
        for path in sorted(root.rglob("*.py"))
        if not {"site-packages", "encodings"} & set(path.parts) and path.stat().st_size < 300_000
    ]
    random.Random(0).shuffle(sources)
    held_out = len(sources) // 20
    for name, paths in (("held-out", sources[:held_out]), ("train", sources[held_out:])):
        documents = (path.read_bytes().decode("utf-8", "ignore") for path in paths)
        lines = (json.dumps({"text": document}) + "\n" for document in documents if document.strip())
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"text: {len(sources)} files of {root}, {held_out} of them held out; vocabulary: Tekken's first {VOCABULARY}")


def print_table(report: dict[str, Any]) -> None:
    """The stages side by side."""
    columns = ("loss", "perplexity", "r", "load_max_over_mean", "params_total", "params_active", "seconds")
    titles = ("loss", "perplexity", "R", "load max/mean", "parameters", "active", "seconds")
    print(f"\n{'':10}" + "".join(f"{title:>15}" for title in titles))
    for name in STAGES:
        values = [report[name][column] for column in columns]
        cells = ["-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.3f}" for v in values]
        print(f"{name:10}" + "".join(f"{cell:>15}" for cell in cells))
    for name, sample in report["samples"].items():
        print(f"\n--- {name} continues {report['prompt']!r}:\n{sample}")
    print(f"\n{report['seconds']:.0f} s in all; report: {Path(report['dense']['model_dir']).parent / 'report.html'}")


if __name__ == "__main__":
    main()
