"""The command `nemoe-convert`: turns one model directory into another, and compares them."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from convert.carve import CARVE
from convert.gguf import GGUF
from convert.layout import LAYOUT
from convert.merge import MERGE
from nemoe_jax.command import EXIT_DISAGREES, Command, report

CONVERSIONS = (CARVE, GGUF, LAYOUT, MERGE)

DESCRIPTION = """\
Converts Hugging Face model directories, layer by layer: memory holds a few layers, whatever the model.

  nemoe-convert carve models/nemo-12b models/nemoe-12b-16e --experts 16 --top-k 4
  nemoe-convert verify models/small-moe

The result grows beside the target and takes its name when it is complete. An interrupted conversion goes on where it
stopped when the same command is given again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    command = Command("nemoe-convert", DESCRIPTION)

    for conversion in CONVERSIONS:
        conversion.add_to(command)
    parser = command.add(
        "verify",
        _verify,
        "compare our logits with those of Hugging Face transformers in torch",
        "For any model small enough for torch on this machine (the extra `verify` brings torch and transformers).\n"
        "Exit status 0 where they agree, 1 where they do not. NekoMind models are compared with a torch model put\n"
        "together from transformers' own Qwen2-MoE block and Qwen3 attention.",
        reports=True,
    )
    parser.add_argument("directory", metavar="DIR", help="model directory")
    parser.add_argument("--tokens", type=int, default=64, help="random tokens in each of two sequences (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of those tokens")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference allowed between float32 logits, relative to their standard deviation (default 1e-4)",
    )
    return command.main(argv)


def _verify(arguments: argparse.Namespace) -> int:
    from convert.verify import verify  # torch is not needed, nor loaded, by anything else

    result = verify(arguments.directory, arguments.tokens, arguments.seed, arguments.tolerance)
    report(dataclasses.asdict(result), arguments.json)
    return 0 if result.agrees else EXIT_DISAGREES


if __name__ == "__main__":
    sys.exit(main())
