"""The main job, end to end by its public commands, on a model too small to learn much."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemoe_jax.checkpoints import reader

ROOT = Path(__file__).parents[2]
TINY = ["scratch.layers=1", "scratch.hidden=48", "scratch.heads=2", "scratch.kv_heads=1", "scratch.ffn=256"]
SHORT = ["optimizer.warmup_steps=1", "data.sequence_length=64", "eval_batches=2"]


def test_the_demo_trains_carves_repairs_and_reports(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("mistral_common")
    output = tmp_path / "demo"
    command = [sys.executable, "-m", "examples.demo.demo", "--output", output]
    dense = ["--set", "steps=30", "eval_every=15", *TINY, *SHORT]
    repair = ["--set-repair", "steps=3", "eval_every=1", *SHORT]
    printed = subprocess.run([*command, *dense, *repair], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "$ nemoe-convert carve" in printed and "$ nemoe-train run nano-repair" in printed

    report = json.loads((output / "report.json").read_text())
    for name in ("dense", "reference", "carved", "calibrated", "repaired"):
        assert reader.read_config(report[name]["model_dir"]).experts == (0 if name == "dense" else 16)
        assert report[name]["params_active"] <= report[name]["params_total"]
    assert report["dense"]["loss"] < 8  # from ln 4096 = 8.3: it has learnt something
    gaps = {
        name: report[name]["loss"] - report["dense"]["loss"]
        for name in ("reference", "carved", "calibrated", "repaired")
    }
    for name, gap in gaps.items():
        assert report[name]["r"] == pytest.approx(1 - gap / gaps["reference"])
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page
    assert all((output / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "load.png"))


def test_the_demo_overwrites_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "examples.demo.demo", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "exists already" in done.stderr
    assert list(tmp_path.iterdir()) == []
