"""The command `nemoe-convert`: turns one model directory into another, and compares them."""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Sequence
from typing import Any

from convert.carve import CarveOptions, carve
from convert.stream import MANIFEST
from nemoe_jax.command import EXIT_DISAGREES, Command, report
from nemoe_jax.errors import UserError
from nemoe_jax.hf import SHARD_BYTES

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

    parser = command.add(
        "carve",
        _carve,
        "deal a dense model's FFN neurons out to experts and make a router that finds them",
        "Any dense Mistral- or Llama-shaped directory becomes a Mixtral directory of that size; no data is needed.\n"
        f"{MANIFEST} in the result records the options and the figures of each layer.",
        reports=True,
    )
    parser.add_argument("source", metavar="SRC", help="dense model directory")
    parser.add_argument("destination", metavar="DST", help="directory to make; must not exist")
    for field in dataclasses.fields(CarveOptions):
        _add_option(parser, field)
    parser.add_argument(
        "--shard-gb",
        type=float,
        default=SHARD_BYTES / 1e9,
        metavar="N",
        help="size of a weight file, and of what memory holds, in 1e9 bytes; whole layers, at least one (default 2)",
    )

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


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    """A dataclass field as a flag."""
    flag = "--" + field.name.replace("_", "-")
    kind = field.type
    shown = "" if field.default == () else f" (default {field.default})"
    common: dict[str, Any] = {"default": field.default, "help": field.metadata["help"] + shown}
    if typing.get_origin(kind) is typing.Literal:
        parser.add_argument(flag, choices=typing.get_args(kind), **common)
    elif typing.get_origin(kind) is tuple:
        parser.add_argument(flag, nargs="+", metavar="TEXT", **common)
    else:
        parser.add_argument(flag, type=kind, metavar="N", **common)


def _carve(arguments: argparse.Namespace) -> None:
    given: dict[str, Any] = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(CarveOptions)}
    options = CarveOptions(**{**given, "calibration": tuple(given["calibration"])})
    if not arguments.shard_gb > 0:
        raise UserError(f"--shard-gb: wanted a positive number, got {arguments.shard_gb}")
    manifest = carve(arguments.source, arguments.destination, options, int(arguments.shard_gb * 1e9))
    layers = manifest["layers"]
    scales = [scale for layer in layers for scale in layer["output_scale"]]
    report(
        {
            "directory": arguments.destination,
            "experts": options.experts,
            "top_k": options.top_k,
            "expert_ffn": manifest["result"]["expert_ffn"],
            "layers": len(layers),
            "router_orthogonality_error": max(layer["router_orthogonality_error"] for layer in layers),
            "output_scale_min": min(scales),
            "output_scale_max": max(scales),
        },
        arguments.json,
    )


def _verify(arguments: argparse.Namespace) -> int:
    from convert.verify import verify  # torch is not needed, nor loaded, by anything else

    result = verify(arguments.directory, arguments.tokens, arguments.seed, arguments.tolerance)
    report(dataclasses.asdict(result), arguments.json)
    return 0 if result.agrees else EXIT_DISAGREES


if __name__ == "__main__":
    sys.exit(main())
