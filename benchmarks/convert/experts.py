"""What upcycling, expert pruning, router distillation and width pruning do to the models of `make demo-nano`.

    python -m benchmarks.convert.experts --models runs/demo-nano   (ten minutes on 2 cores; goes on where it stopped)

Named peers: the source's own logits for upcycling; dropping the least often chosen experts for expert pruning; pruning
alone for the routers' distillation; channels and neurons at random for width pruning. Losses are on the held-out text,
which no calibration reads.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from examples.demo.steps import run

WINDOWS = ("--batch-size", "8", "--batches", "16")
KEPT_EXPERTS = "8"
NARROW = ("--hidden", "204", "--ffn", "820")  # four fifths of both widths


def main() -> None:
    """Makes what is not there yet and prints the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/demo-nano"), help="directory of the demo")
    models: Path = parser.parse_args().models
    train, held_out = str(models / "text" / "train.jsonl"), str(models / "text" / "held-out.jsonl")
    dense, carved = models / "dense", models / "calibrated"
    work = models / "mixtures"
    work.mkdir(exist_ok=True)

    def made(name: str, *command: str) -> dict[str, Any]:
        """Runs a command that makes work/NAME; its figures, and the model's held-out loss, are kept beside it."""
        kept = work / f"{name}.json"
        if not kept.exists():
            figures = run("nemoe-convert", command[0], command[1], str(work / name), *command[2:])[0]
            figures |= run("nemoe", "perplexity", str(work / name), held_out, *WINDOWS)[0]
            kept.write_text(json.dumps(figures), encoding="utf-8")
        return json.loads(kept.read_text(encoding="utf-8"))

    def loss_of(directory: Path) -> float:
        kept = work / f"{directory.name}-loss.json"
        if not kept.exists():
            kept.write_text(
                json.dumps(run("nemoe", "perplexity", str(directory), held_out, *WINDOWS)[0]), encoding="utf-8"
            )
        return json.loads(kept.read_text(encoding="utf-8"))["loss"]

    check = ("--check", held_out, "--check-tokens", "4096")
    rows = []
    for mode in ("wide", "split", "copies"):
        source = str(carved)
        for experts in ("32", "64"):
            name = f"{mode}-{experts}"
            rows.append((name, made(name, "upcycle", source, "--experts", experts, "--mode", mode, *check)))
            source = str(work / name)
    print(f"\n{'upcycled':12}{'top-k':>8}{'difference / std':>18}{'changed choices':>17}{'loss':>9}")
    print(f"{'source':12}{'4':>8}{'':18}{'':17}{loss_of(carved):9.4f}")
    for name, figures in rows:
        difference, changed = figures["check_max_difference"], figures["check_changed_choices"]
        print(f"{name:12}{figures['top_k']:8}{difference:18.1e}{changed:17.4f}{figures['loss']:9.4f}")

    text = ("--calibration", train)
    shape = ("prune-experts", str(carved), "--experts", KEPT_EXPERTS)
    pruned = {method: made(method, *shape, "--method", method, *text) for method in ("frequency", "reap", "exhaustive")}
    pruned["exhaustive, routers distilled"] = made(
        "distilled", "distill-routers", str(work / "exhaustive"), "--teacher", str(carved), "--steps", "100", *text
    )
    damage = pruned["frequency"]["loss"] - loss_of(carved)
    print(f"\n{'16 to 8 experts':22}{'loss':>9}{'damage / frequency':>20}")
    for name, figures in pruned.items():
        print(f"{name:22}{figures['loss']:9.4f}{(figures['loss'] - loss_of(carved)) / damage:20.3f}")

    shape = ("minitron", str(dense), *NARROW, *text)
    narrow = {
        "random": made("random", *shape, "--importance", "random"),
        "activations": made("activations", *shape, "--no-rescale-norms"),
        "activations, norms rescaled": made("rescaled", *shape),
    }
    damage = narrow["random"]["loss"] - loss_of(dense)
    print(f"\n{'4/5 of the width':30}{'loss':>9}{'damage / random':>17}")
    for name, figures in narrow.items():
        print(f"{name:30}{figures['loss']:9.4f}{(figures['loss'] - loss_of(dense)) / damage:17.3f}")


if __name__ == "__main__":
    main()
