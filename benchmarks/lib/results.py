"""What every benchmark says of the machine it ran on, and where its figures are kept."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def machine(packages: Iterable[str] = ("jax", "jaxlib", "flax")) -> dict[str, Any]:
    """The day, the processor, the cores that this process may use, and the packages' versions."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()} {model}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def add_keep(parser: argparse.ArgumentParser) -> None:
    """The flag `--keep`."""
    parser.add_argument("--keep", action="store_true", help="write the figures to benchmarks/results/")


def keep(name: str, figures: dict[str, Any]) -> None:
    """Writes them to benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
