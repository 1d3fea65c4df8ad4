"""Conversions as commands: the fields of a dataclass of options become flags, and every conversion shares the rest."""

import argparse
import dataclasses
import importlib
import sys
import types
import typing
from typing import Any

from convert.settings import MANIFEST, REPORT, ConversionSettings
from nemoe_jax.errors import UserError
from nemoe_jax.utils.command import Command, print_figures
from nemoe_jax.utils.distributed import add_distributed_flag, join_distributed
from nemoe_jax.utils.output_path import SHARD_BYTES


def option(default: Any, help: str, metavar: str | None = None, *, positional: bool = False) -> Any:
    """A field of an options dataclass; `dataclasses.MISSING` as default makes a flag that must be given.

    A positional one stands between SRC and DST.
    """
    return dataclasses.field(default=default, metadata={"help": help, "metavar": metavar, "positional": positional})


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A sub-command `NAME SRC DST [flags]` that makes a model directory (or file) from another.

    `function` is what makes it, as `module:name`, imported when the command runs: (source, destination, options,
    settings) -> manifest. Its module's `printed_figures` takes from the manifest what the command prints; its
    `last_words`, where it has some, gives a note for standard error.
    """

    name: str
    function: str
    options: type  # a dataclass made with `option`
    summary: str  # one line
    details: str  # the rest of --help
    streams: bool = True  # whether the flags of `ConversionSettings` apply
    source_help: str = "model directory"
    destination_help: str = "directory to make; must not exist"
    former: tuple[str, ...] = ()  # names that it had

    def add_to(self, command: Command) -> None:
        """Declares the sub-command."""
        details = self.details + (
            f"\n{MANIFEST} in the result records what was done, {REPORT} shows it." if self.streams else ""
        )
        parser = command.add(self.name, self._handle, self.summary, details, reports=True, former=self.former)
        parser.add_argument("source", metavar="SRC", help=self.source_help)
        fields = dataclasses.fields(self.options)
        for field in fields:
            if field.metadata["positional"]:
                parser.add_argument(field.name, metavar=field.metadata["metavar"], help=field.metadata["help"])
        parser.add_argument("destination", metavar="DST", help=self.destination_help)
        for field in fields:
            if not field.metadata["positional"]:
                _add_flag(parser, field)
        if self.streams:
            _add_run_flags(parser)

    def _handle(self, arguments: argparse.Namespace) -> None:
        given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(self.options)}
        options = self.options(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        )
        run = _run_of(arguments) if self.streams else ConversionSettings()
        module_name, _, name = self.function.partition(":")
        module = importlib.import_module(module_name)
        manifest = getattr(module, name)(arguments.source, arguments.destination, options, run)
        if not run.dry_run:
            print_figures({"destination": arguments.destination, **module.printed_figures(manifest)}, arguments.json)
            if words := getattr(module, "last_words", lambda manifest: "")(manifest):
                print("note:", words, file=sys.stderr)
            return
        plan = manifest.plan
        print_figures(
            {
                "would_write": arguments.destination,
                "files": plan.files if arguments.json else len(plan.files),
                "gigabytes": plan.bytes / 1e9,
                "free_gigabytes": plan.free_bytes / 1e9,
                "seconds_per_layer": plan.seconds_per_layer,
                "seconds_without_writing": plan.seconds,
            },
            arguments.json,
        )


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    """A dataclass field as a flag."""
    kind, default = field.type, field.default
    flag = "--" + field.name.replace("_", "-")
    required = default is dataclasses.MISSING
    shown = "" if required or default in ((), None, "") or kind is bool else f" (default {default})"
    common: dict[str, Any] = {"help": field.metadata["help"] + shown, "dest": field.name}
    common |= {"required": True} if required else {"default": default}
    if isinstance(kind, types.UnionType):  # int | None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if kind is bool:
        name = flag.replace("--", "--no-") if default else flag
        parser.add_argument(name, action="store_false" if default else "store_true", **common)
    elif typing.get_origin(kind) is typing.Literal:
        parser.add_argument(flag, choices=typing.get_args(kind), **common)
    elif typing.get_origin(kind) is tuple:
        parser.add_argument(flag, nargs="+", metavar=field.metadata["metavar"] or "TEXT", **common)
    else:
        parser.add_argument(flag, type=kind, metavar=field.metadata["metavar"] or "N", **common)


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-gb",
        type=float,
        default=SHARD_BYTES / 1e9,
        metavar="N",
        help="size of a weight file in 1e9 bytes; whole layers, at least one (default 2)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and time one layer; write nothing")
    add_distributed_flag(parser, "each of which takes its own layers")


def _run_of(arguments: argparse.Namespace) -> ConversionSettings:
    if not arguments.shard_gb > 0:
        raise UserError(f"--shard-gb: expected a positive number, got {arguments.shard_gb}")
    join_distributed(arguments.distributed)
    return ConversionSettings(int(arguments.shard_gb * 1e9), arguments.dry_run)
