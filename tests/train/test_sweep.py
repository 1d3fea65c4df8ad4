"""Sweeps over sizes and learning rates: what they compare, a run that diverges, and going on."""

import json
from pathlib import Path

import pytest

from nemoe_jax.errors import ResumableError
from nemoe_jax.spec.schema import count
from tests.support.train_runs import DENSE, make_workplace, write_recipe
from train.cli import main
from train.run import sweep as sweep_module


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_workplace(tmp_path)
    return str(write_recipe(tmp_path / "recipe.yaml", tmp_path, "scratch", steps=4, max_skipped=0))


def test_a_diverging_run_is_reported_the_others_go_on_and_finished_ones_are_kept(recipe, monkeypatch, capsys):
    size, other = "scratch.ffn=32,scratch.layers=1", "scratch.ffn=16"
    command = ["sweep", recipe, "--output", "runs", "--learning-rates", "1e-2,1e30", "--json", "--size", size]
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["size"], row["learning_rate"]) for row in rows] == [(size, 1e-2), (size, 1e30)]
    report = json.loads(Path("runs", rows[0]["directory"], "report.json").read_text())
    assert rows[0]["held_out_loss"] == report["held_out_loss_after"] < report["held_out_loss_before"]
    assert rows[0]["params_total"] == count(DENSE.replace(ffn=32, layers=1))[0]
    assert "diverged" in rows[1] and "held_out_loss" not in rows[1]
    assert json.loads(Path("runs/sweep.json").read_text()) == rows
    assert "image/png" in Path("runs/sweep.html").read_text() and "diverged" in Path("runs/sweep.html").read_text()

    started = []

    def fail(recipe):
        started.append(recipe.output.name)
        raise ResumableError("not finite again")

    monkeypatch.setattr(sweep_module, "train", fail)
    assert main([*command, "--size", other]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again[0] == rows[0] and all("not finite again" in row["diverged"] for row in again[1:])
    assert [row["size"] for row in again] == [size, size, other, other]
    assert started == [row["directory"] for row in again[1:]] and len({*started}) == 3


@pytest.mark.parametrize(
    "words, message",
    [
        (["--learning-rates", "1e-3,fast"], "--learning-rates: expected numbers, got 1e-3,fast"),
        (["--learning-rates", "1e-3", "--size", "scratch.fnf=3"], "scratch.fnf: unknown key"),
        (["--learning-rates", "1e-3", "--size", "scratch.hidden=0"], "hidden: expected a positive number, got 0"),
        (["--learning-rates=-1"], "learning_rate: expected greater than 0"),
        (["data.held_out=[]", "--learning-rates", "1e-3"], "data.held_out: expected one for a sweep"),
    ],
)
def test_bad_input_is_found_before_the_first_run(recipe, capsys, words, message):
    assert main(["sweep", recipe, *words, "--output", "runs"]) == 2
    assert message in capsys.readouterr().err and not Path("runs").exists()
