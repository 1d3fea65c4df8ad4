"""The command `nemoe-convert`: turns one model directory into another, and compares them."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from convert.options import CONVERSIONS
from nemoe_jax.utils.command import EXIT_DISAGREES, Command, print_figures

DESCRIPTION = """\
Converts Hugging Face model directories, layer by layer: memory holds a few layers, whatever the model.

  nemoe-convert carve models/nemo-12b models/nemoe-12b-16e --experts 16 --top-k 4 --calibration text/
  nemoe-convert upcycle models/nemoe-12b-16e models/nemoe-12b-32e --experts 32
  nemoe-convert gguf models/nemoe-12b-16e nemoe-12b-16e.gguf --type q8_0
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
        "compare logits: ours with those of transformers in torch, or two models with each other",
        "With A alone, transformers' model of it is A and ours is B (the extra `verify` brings what that needs;\n"
        "NekoMind is put together in torch from transformers' own Qwen2-MoE block and Qwen3 attention). With two\n"
        "directories of one vocabulary, of any families, both run in our implementation, one after the other: a dense\n"
        "model and its carved one, a model before and after merging. All in float32.\n\n"
        "It prints:\n"
        "  agrees            whether the largest difference is within the tolerance\n"
        "  max_difference    largest absolute difference of two logits\n"
        "  logit_std         standard deviation of A's logits\n"
        "  kl_divergence     KL(A ‖ B) of the next token, mean over tokens, nats\n"
        "  kl_max            its largest over tokens\n"
        "  argmax_agreement  share of tokens after which A and B find the same one likeliest; the rest changed\n"
        "  tokens            how many were compared\n"
        "  loss_a, loss_b    with --text: mean loss of the text's next token, nats\n\n"
        "Exit status 0 where they agree, 1 where they do not.",
        reports=True,
    )
    parser.add_argument("directory", metavar="A", help="model directory")
    parser.add_argument("other", metavar="B", nargs="?", help="model directory to compare with it (default: torch)")
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="text, .jsonl, directories or globs, in A's tokens"
    )
    parser.add_argument("--tokens", type=int, default=64, help="length of a sequence (default 64)")
    parser.add_argument(
        "--sequences", type=int, default=2, help="random sequences, or evenly spaced windows of the text (default 2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of random tokens")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference allowed between float32 logits, relative to their standard deviation (default 1e-4)",
    )
    return command.main(argv)


def _verify(arguments: argparse.Namespace) -> int:
    from convert.verify.logits import verify  # torch is not needed, nor loaded, by anything else

    result = verify(
        arguments.directory,
        arguments.other,
        texts=arguments.text,
        tokens=arguments.tokens,
        sequences=arguments.sequences,
        seed=arguments.seed,
        tolerance=arguments.tolerance,
    )
    figures = dataclasses.asdict(result)
    print_figures({name: value for name, value in figures.items() if value is not None}, arguments.json)
    return 0 if result.agrees else EXIT_DISAGREES


if __name__ == "__main__":
    sys.exit(main())
