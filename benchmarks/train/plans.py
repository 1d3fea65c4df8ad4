"""Memory and work of training steps on TPU slices and GPUs, by their compilers.

Needs libtpu (pip install .[tpu]), for GPUs JAX's plugin for CUDA, and neither a TPU nor a GPU.

    python -m benchmarks.train.plans                  (a few minutes for each case on 2 cores; goes on where it stopped)
    python -m benchmarks.train.plans --case v5e-8k    (that one, anew)

Named limit: what a program may use of the chip's memory, as the compiler has it. Further limits are in the table: the
first case is to stay below 13e9 bytes. Figures go to benchmarks/results/plans.json.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.lib.results import RESULTS

RESULT_FILE = RESULTS / "plans.json"
LORA_16 = ("recalibration", "nemoe-12b-16e", "model=nemoe-12b-16e")  # phase, recipe, what is changed in it
LORA_512 = ("language", "nemoe-12b-16e", "model=nemoe-12b-16e")
REPAIR = ("train", "nemoe-12b-16e-repair", "model=nemoe-12b-16e", "distill.teacher=mistral-nemo-12b", "mesh=auto")
DISTILLATION = ("train", "minitron-8b-distill", "model=minitron-8b", "distill.teacher=mistral-nemo-12b")


class Case(NamedTuple):
    """A phase of a recipe, a slice, and the bytes per device (1e9) that it is to stay below."""

    recipe: tuple[str, ...]
    topology: str
    sequence_length: int
    batch_size: int
    below: float | None = None  # default: the chip's limit


CASES = {
    "v5e-8k": Case(LORA_16, "v5e:4x4", 8192, 32, below=13.0),
    "v5e-32k": Case(LORA_16, "v5e:4x4", 32768, 4),
    "v5p-128k": Case(LORA_16, "v5p:2x4x4", 131072, 2),
    "v5e-128k": Case(LORA_16, "v5e:4x8", 131072, 2),
    "v5e-distil": Case(DISTILLATION, "v5e:8x8", 8192, 768),
    "v5e-4k": Case(LORA_16, "v5e:4x4", 4096, 16),
    "v5p-8k": Case(LORA_16, "v5p:2x2x4", 8192, 32),
    "v4-8k": Case(LORA_16, "v4:2x2x4", 8192, 32),
    "v6e-8k": Case(LORA_16, "v6e:4x4", 8192, 32),
    "v5e-rank-512": Case(LORA_512, "v5e:4x4", 8192, 16),
    "h100-4k": Case(LORA_16, "h100", 4096, 4),
    "h100-4k-nf4": Case((*LORA_16, "quantize=nf4"), "h100", 4096, 4),
    "h100-repair": Case(REPAIR, "h100", 4096, 4),
    "h100x8-8k": Case(LORA_16, "h100:8", 8192, 32),
    "rtx4090-2k-nf4": Case((*LORA_16, "quantize=nf4"), "rtx4090", 2048, 1),
    "rtx4090-8k-nf4": Case((*LORA_16, "quantize=nf4"), "rtx4090", 8192, 1),
}


def main() -> None:
    """Runs the cases that have no figures yet and prints the table; exit status 1 where one is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="one case, even if there are figures")
    only = parser.parse_args().case
    results: dict[str, Any] = json.loads(RESULT_FILE.read_text("utf-8")) if RESULT_FILE.exists() else {}
    for name in [only] if only else CASES:
        if only or name not in results:
            results[name] = run(CASES[name])
            RESULT_FILE.parent.mkdir(exist_ok=True)
            RESULT_FILE.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    sys.exit(not all(list(show(results))))


def run(case: Case) -> dict[str, Any]:
    """The figures of `nemoe-train plan`."""
    phase, *recipe = case.recipe
    options = (*recipe, f"data.sequence_length={case.sequence_length}", f"data.batch_size={case.batch_size}")
    command = [sys.executable, "-m", "train.cli", "plan", *options, "--topology", case.topology]
    print(" ".join(["nemoe-train", *command[3:]]), file=sys.stderr)
    command += ["--phase", phase, "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout)


def show(results: dict[str, Any]) -> Iterator[bool]:
    """Prints a line for each case, and yields whether it is below its limit."""
    print(f"{'slice':10}{'trains':>22}{'tokens × rows':>15}  {'mesh':22}{'GB':>7}{'limit':>7}{'used':>6}", end="")
    print(f"{'sent GB':>9}{'beside':>8}{'executed/model':>16}{'compiled s':>12}")
    for name, figures in results.items():
        case, total = CASES[name], figures["memory"]["total"]
        limit = case.below * 1e9 if case.below else figures["limit"]
        mesh = ",".join(f"{axis}={size}" for axis, size in figures["mesh"].items())
        shape = f"{case.sequence_length} × {case.batch_size}"
        trains = f"{figures['model']} {figures['trainable']}"[-21:]
        print(f"{case.topology:10}{trains:>22}{shape:>15}  {mesh:22}{total / 1e9:7.2f}{limit / 1e9:7.2f}", end="")
        print(f"{total / limit:6.0%}", end="")
        if figures["collectives"] is not None:
            sent = sum(row["bytes"] for row in figures["collectives"].values()) / 1e9
            count = sum(row["count"] for row in figures["collectives"].values())
            beside = sum(row["asynchronous"] for row in figures["collectives"].values()) / max(count, 1)
            print(f"{sent:9.1f}{beside:8.0%}{figures['flops']['executed_over_model']:16.3f}", end="")
            print(f"{figures['compile_seconds']:12.0f}", end="")
        print()
        yield total <= limit


if __name__ == "__main__":
    main()
