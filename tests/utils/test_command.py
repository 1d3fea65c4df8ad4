"""Former names of sub-commands and flags."""

import argparse

import pytest

from nemoe_jax.utils.command import Command, rename_flags


@pytest.fixture
def command():
    def show(arguments: argparse.Namespace) -> None:
        print(arguments.max_num_seqs, arguments.lora_modules, arguments.text)

    command = Command("nemoe", "description")
    parser = command.add("distill-routers", show, "summary", former=("relay",))
    parser.add_argument("text", nargs="?")
    parser.add_argument("--max-num-seqs", type=int, default=8, help="slots")
    parser.add_argument("--lora-modules", action="append", default=[])
    rename_flags(parser, {"--rows": "--max-num-seqs", "--adapter": "--lora-modules"})
    return command


def test_former_names_do_what_the_new_ones_do(command, capsys):
    new = ["distill-routers", "--max-num-seqs", "3", "--lora-modules=a=b", "--lora-modules", "c=d", "t"]
    former = ["relay", "--rows", "3", "--adapter=a=b", "--adapter", "c=d", "t"]
    assert command.main(new) == 0
    plain = capsys.readouterr()
    assert plain.out == "3 ['a=b', 'c=d'] t\n" and plain.err == ""
    assert command.main(former) == 0
    renamed = capsys.readouterr()
    assert renamed.out == plain.out
    assert renamed.err.splitlines() == [
        "note: relay is now called distill-routers",
        "note: --rows is now called --max-num-seqs",
        "note: --adapter is now called --lora-modules",
        "note: --adapter is now called --lora-modules",
    ]


def test_former_names_are_in_no_help_and_no_text(command, capsys):
    for words in (["--help"], ["distill-routers", "--help"]):
        with pytest.raises(SystemExit):
            command.main(words)
    help_text = capsys.readouterr().out
    assert "distill-routers" in help_text and "--max-num-seqs" in help_text
    assert "relay" not in help_text and "--rows" not in help_text and "--adapter" not in help_text
    assert command.main(["distill-routers", "--", "--rows"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "8 [] --rows\n" and printed.err == ""
