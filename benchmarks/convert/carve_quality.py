"""How much of a dense model a carve keeps, before and after repair, on a model of 8M parameters trained here.

    python -m benchmarks.convert.carve_quality --output runs/quality  (an hour on 2 cores; goes on where it stopped)

R = 1 − gap / gap of the reference, where a gap is held-out loss above the dense model's; the reference, the named peer,
is carved from contiguous neurons with a random orthonormal router and the output scale of least squares, at the same
top-k. The text is the standard library's; calibration and training read one part of it, losses are of another.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from examples.demo.demo import EXPERTS, run, tekken_file, write_corpus

DENSE = (
    "scratch.hidden=256",
    "scratch.layers=6",
    "scratch.heads=8",
    "scratch.ffn=1024",
    "optimizer.learning_rate=3e-3",
    "steps=1100",
    "eval_every=200",
)
SHARED = ("--layout", "shared", "--shared-ffn", "64")
WINDOWS = ("--batch-size", "8", "--batches", "16")
WANTED = {"weights only, top-4": 0.60, "calibrated, top-4": 0.80, "calibrated, top-2": 0.78, "repaired, top-4": 0.88}
MOST_UNEVEN = 1.8


def main() -> None:
    """Makes what is not there yet, measures all, prints the table; exit status 1 where a figure falls short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quality"), help="directory (default runs/quality)")
    parser.add_argument("--calibration-tokens", default="131072", help="tokens for the calibrated carves")
    parser.add_argument("--carve", nargs="*", default=[], metavar="FLAG", help="more flags for the calibrated carves")
    arguments = parser.parse_args()
    text, dense = arguments.output / "text", arguments.output / "dense"
    if not text.exists():
        write_corpus(text, tekken_file())
    train, held_out = str(text / "train.jsonl"), str(text / "held-out.jsonl")
    data = (f"data.train={train}", f"data.held_out={held_out}")
    if not dense.exists():
        run("nemoe-train", "run", "nano-dense", f"output={dense}", f"tokenizer={text / 'tekken.json'}", *data, *DENSE)

    losses = {"dense": measure(arguments.output, dense, held_out)}

    def carved(name: str, top_k: int, *flags: str, experts: int = EXPERTS) -> Path:
        directory = arguments.output / name.replace(", ", "-").replace(" ", "-")
        if not directory.exists():
            shape = ("--experts", str(experts), "--top-k", str(top_k))
            run("nemoe-convert", "carve", str(dense), str(directory), *shape, *flags)
        losses[name] = measure(arguments.output, directory, held_out)
        return directory

    calibration = ("--calibration", train, "--calibration-tokens", arguments.calibration_tokens, *arguments.carve)
    careless = ("--partition", "contiguous", "--router", "random", "--calibration", train, "--no-refit")
    for top_k in (4, 2):
        carved(f"reference, top-{top_k}", top_k, *careless)
        carved(f"weights only, top-{top_k}", top_k)
        directory = carved(f"calibrated, top-{top_k}", top_k, *calibration)
        repaired = arguments.output / f"repaired-top-{top_k}"
        if not repaired.exists():
            distil = (f"model={directory}", f"distill.teacher={dense}", f"output={repaired}")
            run("nemoe-train", "run", "nano-repair", *distil, *data)
        losses[f"repaired, top-{top_k}"] = measure(arguments.output, repaired, held_out)
    # as many active neurons as 4 of 16 experts have, cut otherwise
    carved("calibrated, 32 experts, top-8", 8, *calibration, experts=32)
    carved("calibrated, 15 experts and a shared one, top-3", 3, *calibration, *SHARED, experts=15)
    sys.exit(not print_table(losses))


def measure(output: Path, model: Path, held_out: str) -> dict[str, Any]:
    """The figures of `nemoe perplexity`, kept beside the models."""
    kept = output / f"{model.name}.json"
    if not kept.exists():
        kept.write_text(json.dumps(run("nemoe", "perplexity", str(model), held_out, *WINDOWS)), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def print_table(losses: dict[str, dict[str, Any]]) -> bool:
    """Whether every figure is at least what is expected."""
    dense = losses["dense"]["loss"]
    print(f"\ndense loss {dense:.4f}\n{'':48}{'gap':>8}{'R':>8}{'wanted':>8}{'load max/mean':>15}")
    good = True
    for name, figures in losses.items():
        if name == "dense":
            continue
        reference = losses["reference, top-2" if name.endswith("top-2") else "reference, top-4"]
        r = 1 - (figures["loss"] - dense) / (reference["loss"] - dense)
        wanted, load = WANTED.get(name), figures["load_max_over_mean"]
        good &= wanted is None or (r >= wanted and load <= MOST_UNEVEN)
        shown = "" if wanted is None else f"{wanted:.2f}"
        print(f"{name:48}{figures['loss'] - dense:8.4f}{r:8.3f}{shown:>8}{load:15.2f}")
    return good


if __name__ == "__main__":
    main()
