"""Every command that the documentation shows is parsed as a user's is; those that are marked run on small models."""

import argparse
import contextlib
import importlib
import json

import jax
import pytest

from tests.docs.pages import PAGES, ShownCommand, shown_commands
from tests.support.command_models import write_model
from train.recipe import read_recipe, shipped_recipes

MODULES = {"nemoe": "nemoe_jax.cli.main", "nemoe-convert": "convert.cli", "nemoe-train": "train.cli"}
COMMANDS = [command for page in PAGES for command in shown_commands(page)]
RUN = [command for command in COMMANDS if command.runs]


class Parsed(Exception):
    """Carries what was parsed out of a command that is not to run."""


def parse(monkeypatch, capsys, words: tuple[str, ...]) -> argparse.Namespace:
    """What the command makes of its words. Fails where it refuses them, or knows them by former names only."""

    def parse_args(parser, args=None, namespace=None):
        raise Parsed(whole(parser, args, namespace))

    whole = argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(MODULES[words[0]]).main(list(words[1:]))
    error = capsys.readouterr().err
    assert "is now called" not in error, error
    return parsed.value.args[0]


def test_commands_are_found_on_the_pages_that_show_them():
    pages = {command.page for command in COMMANDS}
    assert {"README.md", "docs/quickstart.md", "docs/convert/carve.md", "docs/train/recipes.md"} <= pages
    shown = {command.words[:2] for command in COMMANDS}
    assert {("nemoe", "serve"), ("nemoe-convert", "merge"), ("nemoe-train", "plan")} <= shown


@pytest.mark.parametrize("shown", COMMANDS, ids=str)
def test_a_command_of_the_documentation_is_one(shown: ShownCommand, monkeypatch, capsys):
    arguments = parse(monkeypatch, capsys, shown.words)
    recipe = getattr(arguments, "recipe", None)
    if recipe in shipped_recipes():
        read_recipe(recipe, arguments.overrides)  # raises where a key is unknown


@pytest.mark.parametrize("name", MODULES)
def test_every_sub_command_explains_itself_and_is_on_a_page(name, capsys):
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for sub_command in sub_commands(help_of(name, [], capsys)):
        assert f"{name} {sub_command}" in text, "on no page"
        assert len(help_of(name, sub_command.split(), capsys)) > 100, sub_command


def help_of(name: str, words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(MODULES[name]).main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def sub_commands(help_text: str) -> list[str]:
    """The names in the list of commands that `--help` prints."""
    _, _, listed = help_text.partition("COMMAND\n")
    names = [line.split("  ")[0] for line in (row[4:] for row in listed.splitlines() if row.startswith("    "))]
    found = [name for name in names if name and not name.startswith(" ")]
    assert found
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with small models and text under the names that the pages use."""
    directory = tmp_path_factory.mktemp("docs")
    dense = {"family": "mistral", "ffn": 96, "experts": 0, "top_k": 0, "expert_ffn": 0}
    sizes = {"hidden": 32, "heads": 4, "head_dim": 16}  # of which Q8_0 can make blocks
    write_model(directory / "models/nemo-12b", layers=2, **dense, **sizes)
    write_model(directory / "models/nemoe-12b-16e")
    (directory / "text").mkdir()
    lines = [json.dumps({"text": f"The sky over town {number} is blue. " * 4}) for number in range(40)]
    for name in ("train", "held-out"):
        (directory / f"text/{name}.jsonl").write_text("\n".join(lines))
    return directory


def test_the_marked_commands_run_one_after_the_other(workplace, capfd):
    assert len(RUN) > 10
    with contextlib.chdir(workplace):
        for shown in RUN:
            status = importlib.import_module(MODULES[shown.words[0]]).main(list(shown.words[1:]))
            assert status == 0, f"{shown}\n{capfd.readouterr().err}"
    assert (workplace / "nemo-12b.gguf").stat().st_size > 1000
    assert (workplace / "models/nemoe-12b-16e-weights/config.json").exists()
    jax.clear_caches()
