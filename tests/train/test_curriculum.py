"""Runs of several phases: gates, what a discarded phase leaves, adapters of each phase, going on between phases."""

import json
import signal

import numpy as np
import pytest

from nemoe_jax.adapters import lora, peft_load
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.spec.schema import leaves
from tests.support.train_runs import TEXT, log_of, make_workplace, write_recipe
from train.cli import main
from train.recipe import read_recipe
from train.run.loop import train
from train.run.run_directory import Interrupted, Signals

ATTENTION = [{"pattern": "blocks/*/attn/*", "rank": 3}]
# the middle one learns nothing but "zzz…" at a rate far too high
SPOILT = {"name": "spoilt", "lora": ATTENTION, "data": {"train": "spoilt.jsonl"}, "optimizer": {"learning_rate": 0.3}}
PHASES = [
    {"name": "first", "lora": ATTENTION, "train_router": True},
    SPOILT,
    {"name": "last", "lora": [{"pattern": "blocks/moe/ffn/[gud]*", "rank": 2, "rslora": True}], "seed": 1},
]
KEYS = {"distill": None, "steps": 6, "tolerance": 0.01, "train_router": False, "checkpoints": {"every": 4}}
CHATS = "".join(
    json.dumps({"conversations": [{"from": "human", "value": text[:20]}, {"from": "gpt", "value": text[20:40]}]}) + "\n"
    for text in TEXT
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("curriculum")
    make_workplace(place)
    (place / "spoilt.jsonl").write_text(json.dumps({"text": "z" * 400}) + "\n")
    (place / "chats.jsonl").write_text(CHATS)
    write_recipe(place / "all.yaml", place, "repair", **KEYS, phases=PHASES)
    write_recipe(place / "without.yaml", place, "repair", **KEYS, phases=[PHASES[0], PHASES[2]], output="without")
    return place


@pytest.fixture(scope="module")
def done(place):
    """Both runs' reports: with the phase that is discarded, and without it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return train(read_recipe("all.yaml")), train(read_recipe("without.yaml"))


def test_a_phase_that_spoils_the_model_is_discarded(place, done):
    phases = done[0].phases
    assert [phase.accepted for phase in phases] == [True, False, True]
    spoilt = phases[1]
    assert spoilt.after.loss > spoilt.before.loss + 0.01
    assert spoilt.before.loss == pytest.approx(phases[0].after.loss, abs=1e-5)
    assert phases[2].before.loss == pytest.approx(phases[0].after.loss, abs=1e-5)
    assert done[0].after.loss == phases[2].after.loss < done[0].before.loss


def test_it_leaves_no_trace_in_the_model(place, done):
    assert (place / "out/model.safetensors").read_bytes() == (place / "without/model.safetensors").read_bytes()
    last = [[line for line in log_of(place / name) if line["phase"] == "last"] for name in ("out", "without")]
    assert last[0] == last[1] and len(last[0]) == 8


def test_each_phase_leaves_its_adapter_and_together_they_are_the_model(place, done):
    adapters = place / "out/adapters"
    assert sorted(path.name for path in adapters.iterdir()) == ["1-first", "2-spoilt.discarded", "3-last"]
    bases = [json.loads((path / "adapter_config.json").read_text()) for path in sorted(adapters.iterdir())]
    ends = [base["base_model_name_or_path"].rpartition("mixture")[2] for base in bases]
    assert ends == ["", " after first", " after first"]
    config, params = pretrained.load_pretrained(place / "mixture")
    for name in ("1-first", "3-last"):
        _, tree = peft_load.load_adapters(adapters / name, config)
        assert any(np.abs(adapter.b).max() > 0 for adapter in leaves(tree).values())
        params = lora.merge(config, params, tree)
    merged, saved = leaves(params), leaves(pretrained.load_pretrained(place / "out")[1])
    for path, array in saved.items():
        np.testing.assert_allclose(merged[path], array, atol=1e-6, err_msg=path)
    assert "blocks/moe/ffn/router" in leaves(peft_load.load_adapters(adapters / "1-first", config)[1])


def test_the_report_shows_the_acceptance_tests(place, done):
    page = (place / "out/report.html").read_text()
    assert page.count("<tr class=discarded>") == 1 and "spoilt" in page and "data:image/png" in page
    assert (place / "out/report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((place / "out/report.json").read_text()) == done[0].as_json()


def test_going_on_between_and_inside_phases(place, done, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    output = f"output={tmp_path / 'again'}"
    for at in (6, 9, 12, 15):  # after the first phase, in the second, at its end, in the last
        with monkeypatch.context() as patch:
            patch.setattr(Signals, "received", lambda self, step, at=at: signal.SIGTERM if step == at else 0)
            with pytest.raises(Interrupted):
                train(read_recipe("all.yaml", [output]))
    report = train(read_recipe("all.yaml", [output]))
    assert (tmp_path / "again/model.safetensors").read_bytes() == (place / "out/model.safetensors").read_bytes()
    assert log_of(tmp_path / "again") == log_of(place / "out")
    assert [phase.accepted for phase in report.phases] == [True, False, True]


def test_every_weight_then_adapters_and_a_discarded_full_phase(place, tmp_path, monkeypatch):
    """A full phase uses its weights' memory again, but one with an acceptance test must be able to give them back."""
    monkeypatch.chdir(place)
    full = {"trainable": "all", "lora": []}
    phases = [full | {"name": "full"}, SPOILT | full, PHASES[2] | {"data": {"train": "chats.jsonl"}}]
    write_recipe(tmp_path / "full.yaml", place, "repair", **KEYS, phases=phases)
    slowly = "phases.0.optimizer={learning_rate: 1e-3}"
    report = train(read_recipe(tmp_path / "full.yaml", [f"output={tmp_path / 'out'}", slowly]))
    assert [phase.accepted for phase in report.phases] == [True, False, True]
    assert [path.name for path in (tmp_path / "out/adapters").iterdir()] == ["3-last"]
    assert report.phases[2].data[0].documents == len(TEXT)


def test_where_every_phase_is_discarded_the_model_is_what_it_was(place, done, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    write_recipe(tmp_path / "bad.yaml", place, "repair", **KEYS, phases=[SPOILT], model="out")
    report = train(read_recipe(tmp_path / "bad.yaml", [f"output={tmp_path / 'out'}"]))
    assert report.after.loss == report.before.loss and report.params_trained == 0
    for path, array in leaves(pretrained.load_pretrained(tmp_path / "out")[1]).items():
        np.testing.assert_array_equal(array, leaves(pretrained.load_pretrained("out")[1])[path], err_msg=path)


def test_an_adapter_of_peft_is_taken_up(place, done, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    write_recipe(tmp_path / "more.yaml", place, "repair", **KEYS | {"lora": [], "adapter": "out/adapters/1-first"})
    keys = [f"output={tmp_path / 'more'}", "steps=2", "optimizer.learning_rate=1e-9"]
    assert main(["run", str(tmp_path / "more.yaml"), *keys]) == 0
    first = json.loads((tmp_path / "more/report.json").read_text())["held_out_loss_before"]
    assert first == pytest.approx(done[0].phases[0].after.loss, abs=1e-4)
