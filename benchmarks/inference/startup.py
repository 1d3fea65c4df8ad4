"""How soon a command answers: help, and the first token of `nemoe generate`, beside another build of the project.

    python -m benchmarks.inference.startup --base /path/to/another/checkout --model models/small

Each command runs in a fresh process with a fresh compilation cache; builds take turns, `--rounds` times, and the least
CPU time (user and system, of all threads) counts, as wall time says little on a busy machine. The first token's time
ends when the process has printed something.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HELP = {
    "nemoe --help": ("nemoe", "--help"),
    "nemoe generate --help": ("nemoe", "generate", "--help"),
    "nemoe-convert --help": ("convert", "--help"),
    "nemoe-convert carve --help": ("convert", "carve", "--help"),
    "nemoe-train --help": ("train", "--help"),
}


def module_of(checkout: Path, command: str) -> str:
    """The module that is a command in that checkout."""
    if command != "nemoe":
        return f"{command}.cli"
    return "nemoe_jax.cli.main" if (checkout / "nemoe_jax" / "cli" / "main.py").exists() else "nemoe_jax.cli"


def seconds(checkout: Path, command: str, *words: str, cache: str) -> tuple[float, float]:
    """CPU and wall seconds until a command first writes to standard output."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "XDG_CACHE_HOME": cache, "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", module_of(checkout, command), *words],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(1)
        wall = time.monotonic() - started
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        process.stdout.read()
        errors = process.stderr.read().decode()
    if process.returncode or not first:
        raise SystemExit(f"{checkout}: {' '.join(words)} failed:\n{errors}")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), wall


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the other checkout")
    parser.add_argument("--model", type=Path, help="a model directory with a tokenizer; without it only help is timed")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    best: dict[tuple[str, str], tuple[float, float]] = {}

    def note(what: str, build: str, figures: tuple[float, float]) -> None:
        known = best.get((what, build), figures)
        best[what, build] = min(known[0], figures[0]), min(known[1], figures[1])

    builds = {"base": arguments.base.resolve(), "this": ROOT}
    for _ in range(arguments.rounds):
        for build, checkout in builds.items():
            with tempfile.TemporaryDirectory() as cache:
                for what, words in HELP.items():
                    note(what, build, seconds(checkout, *words, cache=cache))
                if arguments.model:
                    prompt = "The capital of France is the city of Paris, and it"
                    words = ("generate", str(arguments.model.resolve()), "--prompt", prompt, "--max-new-tokens", "8")
                    note("first token, first run", build, seconds(checkout, "nemoe", *words, cache=cache))
                    note("first token, second run", build, seconds(checkout, "nemoe", *words, cache=cache))
    print(f"{'CPU seconds (wall)':28}{'base':>16}{'this':>16}{'ratio':>8}")
    for what in dict.fromkeys(what for what, _ in best):
        (base, base_wall), (this, wall) = best[what, "base"], best[what, "this"]
        print(f"{what:28}{base:8.2f} ({base_wall:5.2f}){this:8.2f} ({wall:5.2f}){this / base:8.2f}")


if __name__ == "__main__":
    main()
