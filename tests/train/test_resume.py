"""Interrupted runs: killed, stopped, damaged, taken up on another mesh; the result is that of a run nobody touched."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.errors import ResumableError
from tests.support.train_runs import log_of, make_workplace, write_recipe
from train.cli import main
from train.recipe import read_recipe
from train.run import loop
from train.run.loop import train
from train.run.metrics_logger import MetricsLogger
from train.run.phase import PhaseRun
from train.run.prepare import load
from train.run.run_directory import Interrupted, Signals

PARTIAL = Path(".out.partial")
KEYS = {"eval_every": 4, "checkpoints": {"every": 3, "keep": 2}, "distill": None}
KEYS["lora"] = [{"pattern": "blocks/*/attn/*", "rank": 3, "dropout": 0.2}]  # so that the RNG's state counts


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    place = tmp_path_factory.mktemp("workplace")
    make_workplace(place)
    return place


@pytest.fixture(scope="module")
def whole(workplace, tmp_path_factory):
    """The output of a run that nobody interrupted."""
    place = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(place / "recipe.yaml", workplace, "repair", **KEYS)
    assert main(["run", str(recipe), f"output={place / 'out'}"]) == 0
    return place / "out"


@pytest.fixture
def recipe(workplace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path / "recipe.yaml", workplace, "repair", **KEYS)


def interrupt(monkeypatch, at: int):
    """As if SIGTERM came during that step."""
    monkeypatch.setattr(Signals, "received", lambda self, step: signal.SIGTERM if step == at else 0)


def same_result(output: Path, whole: Path) -> bool:
    assert log_of(output) == log_of(whole)
    files = ("model.safetensors", "adapters/1-train/adapter_model.safetensors")
    return all((output / name).read_bytes() == (whole / name).read_bytes() for name in files)


def test_a_process_is_killed_and_the_same_command_again(recipe, whole):
    environment = os.environ | {"PYTHONPATH": str(Path(loop.__file__).parents[2])}
    command = [sys.executable, "-m", "train.cli", "run", str(recipe)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        log, deadline = PARTIAL / "train_log.jsonl", time.monotonic() + 120
        while not (log.exists() and '"step": 4' in log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.005)
        process.kill()
        assert process.wait(60) in (-signal.SIGKILL, 0)  # 0: it was done before the signal came
        stopped = process.returncode != 0
    assert PARTIAL.exists() == stopped and Path("out").exists() != stopped
    if stopped:
        assert main(["run", str(recipe)]) == 0
    assert same_result(Path("out"), whole) and not PARTIAL.exists()


def test_signals_and_the_same_command_again(recipe, whole, monkeypatch, capsys):
    log_step = MetricsLogger.step
    for number, at, status in ((signal.SIGTERM, 4, 143), (signal.SIGINT, 5, 130)):

        def signalled(self, done, figures, number=number, at=at):
            log_step(self, done, figures)
            if done == at:
                os.kill(os.getpid(), number)

        with monkeypatch.context() as patch:
            patch.setattr(MetricsLogger, "step", signalled)
            assert main(["run", str(recipe)]) == status
        assert "the same command goes on" in capsys.readouterr().err
        assert PARTIAL.exists() and not Path("out").exists()
    assert main(["run", str(recipe)]) == 0
    assert same_result(Path("out"), whole) and not PARTIAL.exists()


def test_stopped_after_any_step(recipe, whole, monkeypatch):
    for at in (1, 3, 8):  # and 4, by a signal
        with monkeypatch.context() as patch:
            interrupt(patch, at)
            with pytest.raises(Interrupted) as stopped:
                train(read_recipe(recipe))
            assert stopped.value.exit_status == 143
    assert main(["run", str(recipe), "checkpoints.every=50"]) == 0  # what does not change the result may change
    assert same_result(Path("out"), whole)


def flip_bits(state: Path):
    for data in state.rglob("d/*"):
        content = bytearray(data.read_bytes())
        for at in range(0, len(content), 97):
            content[at] ^= 1
        data.write_bytes(content)


def test_a_damaged_checkpoint_is_left_for_the_one_before(recipe, whole, monkeypatch, capsys):
    for at, damage in ((5, shutil.rmtree), (7, flip_bits)):
        with monkeypatch.context() as patch:
            interrupt(patch, at)
            with pytest.raises(Interrupted):
                train(read_recipe(recipe))
        damage(PARTIAL / f"checkpoints/1-train/{at}/state")
    assert main(["run", str(recipe)]) == 0
    err = capsys.readouterr().err
    assert "warning: " in err and all(f"1-train/{at}: damaged checkpoint" in err for at in (5, 7))
    assert same_result(Path("out"), whole)


def test_no_checkpoint_that_can_be_read_stops_the_run_and_takes_nothing_away(recipe, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(Interrupted):
            train(read_recipe(recipe))
    for step in (PARTIAL / "checkpoints/1-train").iterdir():
        shutil.rmtree(step / "state")
    before = sorted(path.as_posix() for path in PARTIAL.rglob("*"))
    assert main(["run", str(recipe)]) == 2
    assert "no checkpoint can be read" in capsys.readouterr().err
    assert set(before) <= {path.as_posix() for path in PARTIAL.rglob("*")}


def test_a_checkpoint_that_cannot_be_read_now_is_no_damage(recipe, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(Interrupted):
            train(read_recipe(recipe))

    def refused(*_, **__):
        raise ValueError("an error of Orbax") from PermissionError(13, "Permission denied")

    monkeypatch.setattr(ocp.CheckpointManager, "restore", refused)
    assert main(["run", str(recipe)]) == 2
    assert "1-train/4: cannot be read now: an error of Orbax" in capsys.readouterr().err
    assert not list(PARTIAL.rglob("*.damaged"))


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(recipe, whole, monkeypatch, capsys):
    save, tried = ocp.CheckpointManager.save, []

    def full(self, step, *arguments, **options):
        tried.append(step)
        if step == 3:
            raise OSError(28, "No space left on device")
        return save(self, step, *arguments, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    assert main(["run", str(recipe)]) == 0
    assert tried == [3, 6, 8] and same_result(Path("out"), whole)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "checkpoint not saved" in line]
    assert warning.startswith("warning: ") and "No space left on device" in warning


def test_the_best_weights_are_those_of_a_run_that_ended_there(recipe, monkeypatch, capsys):
    evaluator, losses = PhaseRun._evaluator, iter([9.0, 5.0, 3.0, 4.0, 6.0])

    def rising(self, objective):
        evaluate = evaluator(self, objective)
        return lambda *arguments: dataclasses.replace(evaluate(*arguments), loss=next(losses))

    options = ["optimizer.schedule=constant", "eval_every=2", "steps=8"]
    with monkeypatch.context() as patch:
        patch.setattr(PhaseRun, "_evaluator", rising)
        assert main(["run", str(recipe), *options, "select=best", "output=best"]) == 0
    assert "takes step 4, of the lowest held-out loss" in capsys.readouterr().err
    report = json.loads(Path("best/report.json").read_text())
    assert report["held_out_loss_after"] == 3.0 and report["phases"][0]["chosen_step"] == 4
    assert main(["run", str(recipe), *options, "steps=4", "output=ended"]) == 0
    models = [jax.tree.leaves(pretrained.load_pretrained(name)[1]) for name in ("best", "ended")]
    for one, other in zip(*models, strict=True):
        np.testing.assert_array_equal(one, other)


def test_taken_up_on_another_mesh(recipe, monkeypatch):
    keys = ["data.batch_size=8", "lora.0.dropout=0"]
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(Interrupted):
            train(read_recipe(recipe, keys))
    shutil.copytree(PARTIAL, "stopped")
    assert main(["run", str(recipe), *keys, "output=alone"]) == 0
    for mesh in ("fsdp=2,expert=2,sequence=2", "auto"):
        shutil.copytree("stopped", PARTIAL, dirs_exist_ok=True)
        assert main(["run", str(recipe), *keys, "mesh=" + mesh]) == 0
        one, many = ([line["loss"] for line in log_of(Path(name)) if "loss" in line] for name in ("alone", "out"))
        assert many[:4] == one[:4]
        np.testing.assert_allclose(many, one, rtol=1e-4)
        shutil.rmtree("out")


def test_stopped_while_the_output_takes_its_name(recipe, whole, monkeypatch):
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if Path(target).name == "out":
            raise InterruptedError
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(InterruptedError):
            train(read_recipe(recipe))
    assert main(["run", str(recipe)]) == 0
    assert same_result(Path("out"), whole)


def test_what_a_run_of_all_weights_began_with_is_freed_when_it_goes_on(workplace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(write_recipe(tmp_path / "recipe.yaml", workplace, "scratch", steps=4))
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(Interrupted):
            train(recipe)
    begun = []
    monkeypatch.setattr(loop, "load", lambda *what: begun.append(load(*what)) or begun[0])
    train(recipe)
    assert all(array.is_deleted() for array in jax.tree.leaves(begun))


def test_another_recipe_is_refused_and_restart_throws_away(recipe, whole, workplace, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        assert main(["run", str(recipe)]) == 143
    before = sorted(path.as_posix() for path in PARTIAL.rglob("*"))
    assert main(["run", str(recipe), "steps=9"]) == 2
    assert "holds an unfinished run of another recipe or model (phases differ)" in capsys.readouterr().err
    assert sorted(path.as_posix() for path in PARTIAL.rglob("*")) == before
    weights = workplace / "mixture" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])  # as large as before
    assert main(["run", str(recipe)]) == 2
    assert "of another recipe or model (model weights differ)" in capsys.readouterr().err
    weights.write_bytes(content)
    assert sorted(path.as_posix() for path in PARTIAL.rglob("*")) == before
    with (PARTIAL / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a process that is still at it
        assert main(["run", str(recipe), "--restart"]) == 2
    assert "another process is at work there" in capsys.readouterr().err
    assert sorted(path.as_posix() for path in PARTIAL.rglob("*")) == before
    assert main(["run", str(recipe), "--restart"]) == 0
    assert same_result(Path("out"), whole)


def test_too_many_steps_that_are_not_finite_stop_the_run(recipe, workplace, tmp_path, capsys):
    config, params = pretrained.load_pretrained(workplace / "mixture")
    params["norm"] = params["norm"].at[0].set(3e38)  # finite, but not what comes of it
    pretrained.save_pretrained(tmp_path / "hot", config, params)
    shutil.copy(workplace / "tekken.json", tmp_path / "hot")
    with pytest.raises(ResumableError, match=r"more than 2 steps in a row .* not finite; there is no checkpoint"):
        train(read_recipe(recipe, ["model=hot", "max_skipped=2", "data.held_out=[]"]))
    assert "step 1: gradient not finite; skipped" in capsys.readouterr().err


def test_two_processes_train_as_one(recipe, whole):
    """Over loopback, one device each: SIGTERM to one of them stops both; going on ends as a single process does."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(loop.__file__).parents[2]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    command = [sys.executable, "-m", "train.cli", "run", str(recipe), "mesh=fsdp=2", "lora.0.dropout=0"]

    def start() -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            job = ["--distributed", f"localhost:{free.getsockname()[1]}", "2"]
        return [
            subprocess.Popen([*command, *job, str(number)], env=environment, stderr=subprocess.PIPE, text=True)
            for number in range(2)
        ]

    def end(processes: list[subprocess.Popen]) -> list[int]:
        errors = [process.communicate(timeout=240)[1] for process in processes]
        assert all(process.returncode in (0, 143) for process in processes), errors
        return [process.returncode for process in processes]

    processes, log = start(), PARTIAL / "train_log.jsonl"
    while not (log.exists() and '"step": 2' in log.read_text()) and all(
        process.poll() is None for process in processes
    ):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    ended = end(processes)
    assert ended in ([143, 143], [0, 0])  # 0: done before the signal came
    if ended == [143, 143]:
        assert end(start()) == [0, 0]
    assert main(["run", str(recipe), "output=alone", "lora.0.dropout=0"]) == 0
    one, two = (
        [line.get("loss", line.get("held_out_loss")) for line in log_of(Path(name))] for name in ("alone", "out")
    )
    np.testing.assert_allclose(two, one, rtol=1e-4)
    for alone, shared in zip(
        jax.tree.leaves(pretrained.load_pretrained("alone")[1]),
        jax.tree.leaves(pretrained.load_pretrained("out")[1]),
        strict=True,
    ):
        np.testing.assert_allclose(alone, shared, atol=2e-3)
    assert json.loads(Path("out/adapters/1-train/adapter_config.json").read_text())["peft_type"] == "LORA"
