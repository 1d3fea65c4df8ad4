"""What experts are worth on a real model: carves at 12, 8 and 4 of 16 experts, each beside its static control.

    python -m benchmarks.convert.carve_quality --demo runs/demo   (after `make demo`; goes on where it stopped)

Named peer: the control, a dense model of as many active neurons with the same refit on the same text. Figures are those
of `nemoe perplexity --reference` on the demo's held-out part.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from examples.demo.steps import run

EXPERTS = 16
COLUMNS = ("loss_above_reference", "kl_divergence", "argmax_agreement", "accuracy", "load_max_over_mean")
MOST_LOST = 1.2  # nats, calibrated at top-4 with 32k tokens


def main() -> None:
    """Makes what is not there yet, measures all, prints the table; exit status 1 where too much is lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="directory of `make demo`")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"), help="directory (default runs/quality)")
    parser.add_argument("--calibration-tokens", default="32768", help="of every carve (default 32768)")
    parser.add_argument("--top-k", nargs="+", default=["12", "8", "4"], help="experts of each token")
    parser.add_argument("--carve", nargs="*", default=[], metavar="FLAG", help="more flags for the carves")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    dense, text = str(arguments.demo / "dense"), arguments.demo / "text"
    train, held_out = str(text / "train.jsonl"), str(text / "held-out.jsonl")

    def measured(name: str, *flags: str) -> dict[str, Any]:
        directory = arguments.output / name
        kept = directory.with_suffix(".json")
        if not kept.exists():
            if not directory.exists():
                run("nemoe-convert", "carve", dense, str(directory), "--experts", str(EXPERTS), *flags)
            kept.write_text(json.dumps(run("nemoe", "perplexity", str(directory), held_out, "--reference", dense)))
        return json.loads(kept.read_text(encoding="utf-8"))

    calibration = ("--calibration", train, "--calibration-tokens", arguments.calibration_tokens)
    rows: dict[str, dict[str, Any]] = {}
    for top_k in arguments.top_k:
        rows[f"control, {top_k}/{EXPERTS}"] = measured(f"control-{top_k}", "--top-k", top_k, *calibration, "--control")
        rows[f"calibrated, {top_k}/{EXPERTS}"] = measured(
            f"calibrated-{top_k}", "--top-k", top_k, *calibration, *arguments.carve
        )
    print(f"\n{'':24}" + "".join(f"{name:>22}" for name in COLUMNS))
    for name, figures in rows.items():
        cells = ["-" if (value := figures.get(column)) is None else f"{value:.3f}" for column in COLUMNS]
        print(f"{name:24}" + "".join(f"{cell:>22}" for cell in cells))
    lost = rows.get(f"calibrated, 4/{EXPERTS}", {}).get("loss_above_reference", 0.0)
    sys.exit(lost > MOST_LOST)


if __name__ == "__main__":
    main()
