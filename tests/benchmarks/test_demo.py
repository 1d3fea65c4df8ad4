"""The main job, end to end by its public commands, on a model too small to learn much."""

import contextlib
import importlib
import io
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from convert.carve import shape
from examples.demo import nano, steps
from nemoe_jax.checkpoints import reader

ROOT = Path(__file__).parents[2]
TINY = ["scratch.layers=1", "scratch.hidden=48", "scratch.heads=2", "scratch.kv_heads=1", "scratch.ffn=256"]
SHORT = ["optimizer.warmup_steps=1", "data.sequence_length=64", "eval_batches=2"]


def run_here(program, **options):
    """As `subprocess.run` of a command of ours, but for the first: in this process, which has imported all."""
    if "nano-dense" in program:
        return subprocess.run(program, **options)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = importlib.import_module(program[2]).main(program[3:])
    return subprocess.CompletedProcess(program, status, printed.getvalue())


def test_the_demo_trains_carves_repairs_and_reports(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("mistral_common")
    output = tmp_path / "demo"
    dense = ["--set", "steps=30", "eval_every=15", *TINY, *SHORT]
    repair = ["--set-repair", "steps=3", "eval_every=1", *SHORT]
    monkeypatch.setattr(sys, "argv", ["nano", "--output", str(output), *dense, *repair])
    monkeypatch.setattr(steps, "subprocess", types.SimpleNamespace(run=run_here, PIPE=subprocess.PIPE))
    few = {"stdlib": Path(steps.__file__).parents[2] / "nemoe_jax"}  # not all of Python's sources
    monkeypatch.setattr(nano, "sysconfig", types.SimpleNamespace(get_paths=lambda: few))
    monkeypatch.setattr(nano, "CALIBRATION_TOKENS", "4096")
    monkeypatch.setattr(shape, "REFIT_TOKENS", 4096)  # enough for steps by gradient
    monkeypatch.setattr(shape, "REFIT_STEPS", 10)
    nano.main()
    printed = capsys.readouterr().out
    assert "$ nemoe-convert carve" in printed and "$ nemoe-train run nano-repair" in printed

    report = json.loads((output / "report.json").read_text())
    for name in ("dense", "control", "weights_only", "calibrated", "repaired"):
        assert reader.read_config(report[name]["model_dir"]).experts == (0 if name in ("dense", "control") else 16)
        assert report[name]["params_active"] <= report[name]["params_total"]
        assert report[name]["gap"] == pytest.approx(report[name]["loss"] - report["dense"]["loss"], abs=1e-5)
    assert report["control"]["params_active"] < report["dense"]["params_active"]
    assert report["dense"]["loss"] < 8  # from ln 4096 = 8.3: it has learnt something
    assert report["dense"]["agreement"] == 1 > report["calibrated"]["agreement"] > 0
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "http" not in page
    assert (output / "load.png").read_bytes().startswith(b"\x89PNG")


def test_the_text_of_the_real_demo_is_split_by_subject(tmp_path):
    from examples.demo.python_text import topics, write_text

    train, held_out = (path.read_text() for path in write_text(tmp_path))
    texts = [[json.loads(line)["text"] for line in part.splitlines()] for part in (train, held_out)]
    assert sum(map(len, texts[0])) > 1e6 and sum(map(len, texts[1])) > 1e5
    assert not set(texts[0]) & set(texts[1])
    of_reference = [sum(text in part for text in topics().values()) for part in texts]
    assert of_reference[0] > 40 and of_reference[1] > 3


def test_the_demo_overwrites_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "examples.demo.nano", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "exists already" in done.stderr
    assert list(tmp_path.iterdir()) == []
