"""What experts are worth on a real model: carves beside the static control, in one run on the same text.

    python -m benchmarks.convert.real_carve --demo runs/demo              (after `make demo`; goes on where it stopped)
    python -m benchmarks.convert.real_carve --demo runs/demo --before ../before      (and an earlier build's directory)

Named peer: the control, a dense model of as many active neurons with the same refit on the same text. Losses are those
of `nemoe perplexity --reference` on the demo's held-out part, of which no fit has seen a subject; CPU seconds and the
largest resident memory are those of the whole command. `x control` is the share of the control's loss above dense.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.lib.results import add_keep, keep, machine

ROWS = {
    # name: (flags of the carve, flags of its control)
    "4/16": ("--experts 16 --top-k 4 --refit-steps 0", "--experts 16 --top-k 4 --refit-steps 0"),
    "4/16 refit": ("--experts 16 --top-k 4 --refit-steps {steps}", "--experts 16 --top-k 4 --refit-steps {steps}"),
    "4/16 overlap 2": ("--experts 32 --top-k 4 --overlap 2 --refit-steps 0", "--experts 16 --top-k 4 --refit-steps 0"),
    "4/16 overlap 2 refit": (
        "--experts 32 --top-k 4 --overlap 2 --refit-steps {steps}",
        "--experts 16 --top-k 4 --refit-steps {steps}",
    ),
    "8/16": ("--experts 16 --top-k 8 --refit-steps 0", "--experts 16 --top-k 8 --refit-steps 0"),
    "8/16 refit": ("--experts 16 --top-k 8 --refit-steps {steps}", "--experts 16 --top-k 8 --refit-steps {steps}"),
    "12/16": ("--experts 16 --top-k 12 --refit-steps 0", "--experts 16 --top-k 12 --refit-steps 0"),
    "12/16 refit": ("--experts 16 --top-k 12 --refit-steps {steps}", "--experts 16 --top-k 12 --refit-steps {steps}"),
}
COLUMNS = ("loss_above_reference", "kl_divergence", "argmax_agreement", "accuracy", "load_max_over_mean")


def main() -> None:
    """Makes what is not there yet, measures all, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="directory of `make demo`")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/real_carve"), help="where models and figures are kept"
    )
    parser.add_argument("--tokens", default="32768", help="of calibration text (default 32768)")
    parser.add_argument("--steps", default="150", help="of the gradient, in rows with `refit` (default 150)")
    parser.add_argument("--seed", default="0", help="of the carves")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--before", type=Path, help="an earlier build's directory, to carve 4/16 with it as well")
    parser.add_argument("--batches", default="8", help="of held-out text, 8 sequences each (default 8)")
    add_keep(parser)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    dense, train, held_out = (
        str((arguments.demo / name).resolve()) for name in ("dense", "text/train.jsonl", "text/held-out.jsonl")
    )
    text = ("--calibration", train, "--calibration-tokens", arguments.tokens, "--seed", arguments.seed)

    def measured(flags: str, build: Path | None = None) -> dict[str, Any]:
        name = "_".join(flags.replace("--", "").split()) + f"_{arguments.tokens}_{arguments.seed}"
        directory = (arguments.output / (name + ("_before" if build else ""))).resolve()
        cost, scores = directory.with_suffix(".cost.json"), directory.with_suffix(f".{arguments.batches}.json")
        if not cost.exists():
            made = timed(build, "convert.cli", "carve", dense, str(directory), *flags.split(), *text)
            cost.write_text(json.dumps({name: made[name] for name in ("cpu_s", "peak_mb")}))
        if not scores.exists():
            against = ("--reference", dense, "--batches", arguments.batches, "--batch-size", "8", "--json")
            scores.write_text(
                timed(None, "nemoe_jax.cli.main", "perplexity", str(directory), held_out, *against)["stdout"]
            )
        return json.loads(scores.read_text(encoding="utf-8")) | json.loads(cost.read_text(encoding="utf-8"))

    table = {}
    for name in arguments.rows:
        carve, control = (flags.format(steps=arguments.steps) for flags in ROWS[name])
        table[f"{name} control"] = measured(f"{control} --control")
        table[name] = measured(carve)
    if arguments.before:
        table["4/16 before"] = measured("--experts 16 --top-k 4", arguments.before.resolve())
    print(f"\n{'':28}" + "".join(f"{name:>22}" for name in (*COLUMNS, "x control", "cpu_s", "peak_mb")))
    for name, figures in table.items():
        control = table.get(f"{name.removesuffix(' before')} control")
        figures["x control"] = control and figures["loss_above_reference"] / control["loss_above_reference"]
        cells = [figures.get(column) for column in (*COLUMNS, "x control", "cpu_s", "peak_mb")]
        print(f"{name:28}" + "".join(f"{'-':>22}" if cell is None else f"{cell:>22.3f}" for cell in cells))
    if arguments.keep:
        keep(
            "real_carve",
            machine() | {"tokens": arguments.tokens, "steps": arguments.steps, "seed": arguments.seed, "rows": table},
        )


def timed(build: Path | None, module: str, *arguments: str) -> dict[str, Any]:
    """Runs a command of this build or of another; its output, CPU seconds and largest resident memory."""
    print(f"$ {module} {shlex.join(arguments)}", flush=True)
    environment = os.environ | ({"PYTHONPATH": str(build)} if build else {})
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, env=environment, cwd=build
    )
    assert process.stdout
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{module} {arguments[0]}: exit status {os.waitstatus_to_exitcode(status)}")
    return {"stdout": output, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024}


if __name__ == "__main__":
    main()
