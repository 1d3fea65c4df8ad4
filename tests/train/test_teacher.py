"""A teacher whose predictions are kept on disk, against the same teacher in memory."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.train_runs import log_of, make_workplace, write_recipe
from train.cli import main
from train.data import teacher_cache
from train.run import phase as phase_module


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    place = tmp_path_factory.mktemp("workplace")
    make_workplace(place)
    return place


def kl_of(output: str) -> list[float]:
    return [line["kl"] for line in log_of(Path(output)) if "kl" in line]


def test_a_cached_teacher_teaches_as_the_live_one_does(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher_cache, "ROWS", 16)
    monkeypatch.setattr("train.run.cache_teacher.ROWS", 16)
    recipe = str(write_recipe(tmp_path / "repair.yaml", workplace, "repair", steps=6, eval_batches=1))
    live = ["distill.temperature=2", "distill.divergence=skew-reverse"]
    cached = [*live, "distill.offline=teacher", "distill.top_k=275"]
    assert main(["run", recipe, *live, "output=live"]) == 0
    assert main(["run", recipe, *cached, "output=cached"]) == 2
    assert "nemoe-train cache-teacher makes it" in capsys.readouterr().err

    assert main(["cache-teacher", recipe, *cached, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["rows_kept"] == 0 < figures["rows"] <= 24 and figures["targets"] <= 32 * figures["rows"]
    shards = sorted(path for path in Path("teacher/train").iterdir() if path.is_dir())
    assert len(shards) > 1
    shutil.rmtree(shards[-1])
    assert main(["run", recipe, *cached, "output=cached"]) == 2
    assert "cache-teacher goes on where it stopped" in capsys.readouterr().err
    assert main(["cache-teacher", recipe, *cached, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["rows_kept"] > 0 < again["rows"] and again["rows"] + again["rows_kept"] == figures["rows"]

    monkeypatch.setattr(phase_module, "share_weights", None)  # which a teacher in memory would go through
    assert main(["run", recipe, *cached, "output=cached"]) == 0
    np.testing.assert_allclose(kl_of("cached"), kl_of("live"), rtol=5e-3)
    assert main(["run", recipe, *cached[:-1], "distill.top_k=8", "output=other"]) == 2
    assert "top_k: expected 8, got 275" in capsys.readouterr().err

    crc = shards[0] / "crc.npy"
    np.save(crc, np.load(crc) + 1)
    assert main(["run", recipe, *cached, "output=other"]) == 2
    assert "of other text than the teacher read" in capsys.readouterr().err and not Path("other").exists()
