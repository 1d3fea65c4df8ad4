"""What the three commands share: parsing, errors as one line with exit status 2, progress bars, `--json`.

A command module declares its sub-commands with `Command.add` and ends in `Command.main`.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemoe_jax.errors import UserError
from nemoe_jax.utils.compilation_cache import VARIABLE, use_compilation_cache

EXIT_DISAGREES = 1  # a comparison came out negative
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """A parser that still takes former names of its flags, which no help shows."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.former_flags: dict[str, str] = {}

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        for at, word in enumerate(words):
            if word == "--":
                break
            flag, equals, value = word.partition("=")
            if flag in self.former_flags:
                words[at] = self.former_flags[flag] + equals + value
                _print_new_name(flag, self.former_flags[flag])
        return super().parse_known_args(words, namespace)


def rename_flags(parser: argparse.ArgumentParser, former: Mapping[str, str]) -> None:
    """Keeps former names of flags as hidden aliases; using one says on standard error how the flag is called now.

    Args:
        parser: what `Command.add` returned.
        former: the new flag by its former name, such as `{"--rows": "--max-num-seqs"}`.
    """
    assert isinstance(parser, _Parser)
    parser.former_flags.update(former)


class Command:
    """A command with sub-commands; each handler takes the parsed arguments and returns an exit status or None."""

    def __init__(self, name: str, description: str):
        self._former: dict[str, str] = {}  # sub-commands by their former names
        self.parser = _Parser(prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self.parser.add_argument(
            "--compilation-cache",
            metavar="DIR|none",
            help=f"where compiled programs are kept for the next run (default: the environment's {VARIABLE}, or a "
            "directory in the user's cache); not used with several virtual CPU devices",
        )
        self.subparsers = self.parser.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)

    def add(
        self,
        name: str,
        handler: Callable[[argparse.Namespace], int | None],
        summary: str,
        details: str = "",
        *,
        reports: bool = False,
        former: Sequence[str] = (),
    ) -> argparse.ArgumentParser:
        """Adds a sub-command.

        Args:
            reports: gives it `--json`, for `print_figures` below.
            former: names that it had; they go on working as hidden aliases.
        """
        self._former.update(dict.fromkeys(former, name))
        parser = self.subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary}\n\n{details}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(handler=handler)
        # SUPPRESS: the default of a sub-command's flag must not undo `--debug` given before its name
        parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        parser.add_argument("--compilation-cache", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if reports:
            parser.add_argument("--json", action="store_true", help="print the figures as JSON on standard output")
        return parser

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Parses, runs the handler, and turns a UserError into one line and exit status 2."""
        arguments = self.parser.parse_args(self._join_name(self._renamed(sys.argv[1:] if argv is None else argv)))
        try:
            use_compilation_cache(arguments.compilation_cache)
            return arguments.handler(arguments) or 0
        except UserError as error:
            if arguments.debug:
                traceback.print_exc()
            print("error:", " ".join(str(error).split("\n")), file=sys.stderr)
            return EXIT_BAD_INPUT
        except (RuntimeError, AssertionError):
            missing = _missing_backend()
            if not missing or arguments.debug:
                raise
            print(f"error: {missing}", file=sys.stderr)
            return EXIT_BAD_INPUT
        except KeyboardInterrupt as interrupt:
            print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
            return EXIT_INTERRUPTED
        except BrokenPipeError:  # the reader of a pipe went away, as `| head` does
            sys.stderr.close()
            return 0

    def _renamed(self, argv: Sequence[str]) -> list[str]:
        """The words with the sub-command's new name where a former one was given."""
        words = list(argv)
        first = _first_word(words)
        if first < len(words) and words[first] in self._former:
            _print_new_name(words[first], self._former[words[first]])
            words[first] = self._former[words[first]]
        return words

    def _join_name(self, argv: Sequence[str]) -> list[str]:
        """A sub-command whose name is two words, such as `tokenize compare`, as the one word that argparse knows."""
        first = _first_word(argv)
        name = " ".join(argv[first : first + 2])
        return [*argv[:first], name, *argv[first + 2 :]] if name in self.subparsers.choices else list(argv)


def _first_word(argv: Sequence[str]) -> int:
    """Where the sub-command's name begins."""
    valued = {number + 1 for number, word in enumerate(argv) if word == "--compilation-cache"}
    return next((i for i, word in enumerate(argv) if not word.startswith("-") and i not in valued), len(argv))


def _print_new_name(former: str, name: str) -> None:
    print(f"note: {former} is now called {name}", file=sys.stderr)


def _missing_backend() -> str:
    """Whether JAX_PLATFORMS asks for a backend that is not there: what to say of it, or nothing."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if not platforms or "jax" not in sys.modules:
        return ""
    try:
        sys.modules["jax"].devices()
    except (RuntimeError, AssertionError) as error:  # the latter where no plugin of that name is installed
        return " ".join(f"JAX_PLATFORMS={platforms}: JAX finds no such backend here. {error}".split())
    return ""


def check_numbers(arguments: argparse.Namespace, *names: str, least: int = 1) -> None:
    """Raises UserError on a flag whose number is below `least`; one that was not given (None) is fine."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < least:
            kind = "a positive number" if least else "0 or more"
            raise UserError(f"--{name.replace('_', '-')}: expected {kind}, got {value}")


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """Prints figures as `name  value` lines, or as one JSON object."""
    if as_json:
        print(json.dumps(figures))
        return
    width = max(map(len, figures), default=0)
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:,.6g}" if isinstance(value, float) else f"{name:<{width}}  {value}")


def read_text(path: str) -> str:
    """The text of a file, or of standard input where the path is `-`; bad UTF-8 as U+FFFD. Raises UserError."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return data.decode("utf-8", "replace")
