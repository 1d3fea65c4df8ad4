"""Which output scale a weights-only carve should take: held-out loss over the scale, against least squares.

    python -m benchmarks.convert.output_scale runs/demo/dense runs/demo/text/train.jsonl runs/demo/text/held-out.jsonl

Named peer: the scale that least squares finds for each expert on calibration text. Each row is a whole carve, measured
by `nemoe perplexity`; the gap is the loss above the dense model's, the ratio the gap over the peer's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SCALES = (2, 4, 6, 8, 10, 12, 16)


def main() -> None:
    """Carves with each scale and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="dense model directory with a tokenizer")
    parser.add_argument("calibration", help="text for least squares")
    parser.add_argument("held_out", help="text to measure on")
    parser.add_argument("--experts", default="16")
    parser.add_argument("--top-k", default="4")
    arguments = parser.parse_args()

    def figures(module: str, *command: str) -> dict[str, float]:
        program = [sys.executable, "-m", module, *command, "--json"]
        return json.loads(subprocess.run(program, stdout=subprocess.PIPE, check=True).stdout)

    dense = figures("nemoe_jax.cli.main", "perplexity", arguments.dense, arguments.held_out)["loss"]

    def gap(*flags: str) -> float:
        with tempfile.TemporaryDirectory() as directory:
            carved = str(Path(directory) / "carved")
            shape = ("--experts", arguments.experts, "--top-k", arguments.top_k)
            figures("convert.cli", "carve", arguments.dense, carved, *shape, *flags)
            return figures("nemoe_jax.cli.main", "perplexity", carved, arguments.held_out)["loss"] - dense

    peer = gap("--calibration", arguments.calibration, "--router", "gate-mean", "--no-refit")
    print(f"dense loss {dense:.4f}\n{'scale':16} {'gap':>8} {'ratio':>8}\n{'least squares':16} {peer:8.4f} {1:8.3f}")
    for name, flags in (("default", ()), *((str(scale), ("--output-scale", str(scale))) for scale in SCALES)):
        found = gap(*flags)
        print(f"{name:16} {found:8.4f} {found / peer:8.3f}")


if __name__ == "__main__":
    main()
