"""Pretraining: a tokenizer from text, routers balanced by a bias, growing rows, and a NekoMind from scratch."""

import json
import signal
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest

transformers = pytest.importorskip("transformers")

from nemoe_jax.model.moe import top_k_weights
from nemoe_jax.text.chat.render import render_chat
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.train_runs import log_of, make_workplace, write_recipe
from train.cli import main
from train.data.packing import Batch, shortened
from train.data.train_tokenizer import CONTROL
from train.recipe import Data, read_recipe
from train.run import phase
from train.run.loop import train
from train.run.run_directory import Interrupted, Signals

VOCAB = 400
NANO = "hidden=32 layers=2 kv_heads=2 heads=4 head_dim=8 ffn=64 dense_layers=1"
NANO += " experts=8 top_k=2 expert_ffn=16 shared_ffn=16"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Python's help texts, a part of them held out, and a tokenizer trained on the rest."""
    root = tmp_path_factory.mktemp("pretrain")
    texts = [text for _, text in sorted(topics.items())]
    (root / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[8:40]))
    (root / "held-out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:8]))
    chat = [{"role": "user", "content": "ab ab"}, {"role": "assistant", "content": "ba"}]
    (root / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    words = ["tokenizer", str(root / "train.jsonl"), str(root / "chats.jsonl"), "--vocab", str(VOCAB)]
    assert main([*words, "--output", str(root / "tokenizer")]) == 0
    return root


# tokenizer


def test_a_trained_tokenizer_is_transformers_own(place):
    ours, theirs = (load(place / "tokenizer") for load in (load_tokenizer, transformers.AutoTokenizer.from_pretrained))
    assert ours.vocab_size == len(theirs) == VOCAB and theirs.convert_tokens_to_ids(list(CONTROL)) == [*range(6)]
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    for text in ("def parse(tree):\n\treturn tree", "naïve 漢字 🙂", ""):
        assert ours.encode_document(text) == [*theirs(text).input_ids, 2]
        assert ours.decode(ours.encode(text)) == text
    assert CONTROL.index("<|im_end|>") not in ours.encode("said <|im_end|> in a text")
    chat = [{"role": "system", "content": "Obey."}, {"role": "user", "content": "Sum 1 and 2"}]
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert render_chat(ours, chat) == expected and expected[:2] == [1, CONTROL.index("<|im_start|>")]


@pytest.mark.parametrize(
    "words, message",
    [
        (["train.jsonl", "--vocab", "200"], "--vocab: expected at least 262"),
        (["chats.jsonl", "--vocab", "9000"], "--vocab: expected at most the 26"),
        (["nowhere", "--vocab", "300"], "nowhere: no text there"),
        (["bad.jsonl", "--vocab", "300"], "bad.jsonl:1: "),
        (["train.jsonl", "--vocab", "300", "--output", "tokenizer"], "tokenizer: exists already"),
    ],
)
def test_a_tokenizer_of_bad_input_is_refused_and_nothing_stays(place, monkeypatch, capsys, words, message):
    monkeypatch.chdir(place)
    Path("bad.jsonl").write_text('{"text": 7}\n')
    assert main(["tokenizer", *words, *([] if "--output" in words else ["--output", "new"])]) == 2
    assert message in capsys.readouterr().err
    assert not Path("new").exists() and not Path(".new.partial").exists()


# routers balanced without a loss


def test_a_bias_decides_the_choice_and_not_the_weights():
    random = np.random.default_rng(0)
    logits_BTE, bias_E = random.normal(size=(2, 5, 6)).astype("f4"), 2 * random.normal(size=6).astype("f4")
    moved = 0
    for normalize in (True, False):
        weights, chosen = jax.jit(top_k_weights, static_argnums=(1, 2))(logits_BTE, 3, normalize, bias_E)
        for place in np.ndindex(2, 5):
            expected = np.argsort(-(logits_BTE[place] + bias_E), kind="stable")[:3]
            powers = np.exp(logits_BTE[place])
            shares = powers[expected] / (powers[expected].sum() if normalize else powers.sum())
            assert chosen[place].tolist() == expected.tolist()
            np.testing.assert_allclose(weights[place], shares, rtol=1e-5)
            moved += set(expected) != set(np.argsort(-logits_BTE[place])[:3])
    assert moved > 3


@pytest.fixture
def over(tmp_path, tmp_path_factory, monkeypatch):
    """Writes a recipe of the tiny mixture with a router bias, and returns its path."""
    workplace = tmp_path_factory.mktemp("workplace")
    make_workplace(workplace)
    monkeypatch.chdir(tmp_path)
    keys = {"distill": None, "lora": [], "train_router": False, "trainable": "all", "router_bias_rate": 0.05}
    return lambda name="repair", **more: write_recipe(tmp_path / "recipe.yaml", workplace, name, **keys | more)


def test_the_bias_follows_the_load_until_it_vanishes_and_survives_an_interruption(over, monkeypatch):
    recipe = over(steps=6, router_bias_until=0.8, checkpoints={"every": 2, "keep": 9})
    seen, made = [], phase.make_update

    def make_update(objective, *arguments):
        update, loss = made(objective, *arguments), jax.jit(objective.loss)

        def step(state, frozen, teacher, batch):
            load_LE = loss(state.trainable | objective.router_bias(state), frozen, teacher, batch)[1]["load"]
            wanted_LE = state.router_bias + 0.05 * np.sign(0.25 - load_LE)
            state, figures = update(state, frozen, teacher, batch)
            bias_LE = np.array(state.router_bias)
            np.testing.assert_allclose(bias_LE, wanted_LE, atol=1e-6)
            seen.append((int(state.step), bias_LE, objective.router_bias(state)["router_bias"]))
            return state, figures

        return step

    monkeypatch.setattr(phase, "make_update", make_update)
    train(read_recipe(recipe))
    assert [bias_LE.shape for _, bias_LE, _ in seen] == [(2, 4)] * 6 and all(
        bias_LE.any() for _, bias_LE, _ in seen[:1]
    )
    for step, bias_LE, used_LE in seen:  # 4.8 steps: whole until 2.4, then down in a straight line
        np.testing.assert_allclose(used_LE, bias_LE * np.clip(2 - step / 2.4, 0, 1), atol=1e-6)

    whole, expected = Path("out").rename("whole"), list(seen)
    with monkeypatch.context() as patch:
        patch.setattr(Signals, "received", lambda self, step: signal.SIGTERM if step == 3 else 0)
        with pytest.raises(Interrupted):
            train(read_recipe(recipe))
    seen.clear()
    train(read_recipe(recipe))
    assert [step for step, *_ in seen] == [4, 5, 6] and (seen[0][1] == expected[3][1]).all()
    assert log_of(Path("out")) == log_of(whole)
    assert Path("out/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_bias_wants_an_moe_model(over, capsys):
    assert main(["run", str(over("scratch"))]) == 2
    assert "router_bias_rate: expected an MoE model" in capsys.readouterr().err


# growing rows


def test_shortened_rows_end_documents_and_keep_their_targets():
    segments = np.array([[1] * 5 + [2] * 9 + [0] * 2, [1] * 16])
    positions = np.array([[*range(5), *range(9), 0, 0], [*range(16)]])
    inputs = np.arange(32).reshape(2, 16)
    batch = Batch(inputs, inputs + 1, np.ones((2, 16), "f4"), segments, positions)
    for length in (3, 4, 16):
        cut = shortened(batch, length)
        assert cut.inputs is batch.inputs and cut.targets is batch.targets and cut.mask is batch.mask
        for row in range(2):
            for one, other in np.ndindex(16, 16):  # who sees whom, token by token
                before = segments[row, one] == segments[row, other] > 0
                together = cut.segments[row, one] == cut.segments[row, other] > 0
                assert together == (before and one // length == other // length)
            for at in range(14 if row == 0 else 16):
                assert cut.positions[row, at] == min(positions[row, at], at % length)
    assert (shortened(batch, 16).segments[1] == 1).all() and (cut.segments[0, 14:] == 0).all()


def test_the_length_of_rows_grows_to_the_whole():
    data = {"train": "x", "batch_size": 2, "sequence_length": 64, "warmup_length": 16, "warmup_length_steps": 4}
    assert [Data(**data).length_at(step) for step in range(6)] == [16, 28, 40, 52, 64, 64]
    assert Data(**{**data, "warmup_length": None, "warmup_length_steps": 0}).length_at(0) == 64


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("data.warmup_length=8", "data.warmup_length_steps: expected together with warmup_length"),
        ("data.warmup_length=99 data.warmup_length_steps=3", "data.warmup_length: expected at most sequence_length 32"),
        ("router_bias_rate=-1", "router_bias_rate: expected greater than or equal to 0, got -1"),
        ("router_bias_until=0", "router_bias_until: expected greater than 0, got 0"),
        (
            "data.warmup_length=8 data.warmup_length_steps=3 preference.loss=dpo",
            "data.warmup_length: expected none with preference or distill.offline",
        ),
    ],
)
def test_bad_values_are_named(over, capsys, overrides, message):
    assert main(["run", str(over()), *overrides.split()]) == 2
    assert message in capsys.readouterr().err


# the whole


def test_nekomind_from_scratch_learns_more_than_how_often_tokens_occur(place, capsys):
    output = place / "model"
    overrides = [f"output={output}", f"tokenizer={place / 'tokenizer'}", f"data.cache={place / 'cache'}"]
    overrides += [f"data.train={place / 'train.jsonl'}", f"data.held_out={place / 'held-out.jsonl'}"]
    overrides += [f"scratch.{key}" for key in NANO.split()] + ["steps=80", "data.warmup_length_steps=20"]
    overrides += ["data.sequence_length=64", "data.batch_size=8", "eval_every=0", "eval_batches=4"]
    overrides += ["optimizer.name=adamw", "optimizer.learning_rate=1e-2"]
    assert main(["run", "nekomind-nano", *overrides, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)

    tokenizer = load_tokenizer(output)
    streams = []
    for name in ("train", "held-out"):
        rows = map(json.loads, (place / f"{name}.jsonl").read_text().splitlines())
        streams.append(np.concatenate([tokenizer.encode_document(row["text"])[1:] for row in rows]))
    counts = np.bincount(streams[0], minlength=VOCAB) + 1
    unigram = -np.log(counts / counts.sum())[streams[1]].mean()
    assert report["held_out_loss_after"] < unigram - 0.1
    load_LE = np.array(json.loads((output / "report.json").read_text())["expert_load"])
    assert load_LE.shape == (1, 8) and load_LE.min() > 0 and report["load_max_over_mean"] < 2.5
    assert not any(line.get("dead_experts") for line in log_of(output) if line["step"] > 40)
