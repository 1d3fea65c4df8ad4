"""Preference optimization: losses against TRL's, rows in TRL's and UltraFeedback's formats, whole runs."""

import collections
import dataclasses
import json
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax.adapters import lora
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.model.transformer import forward
from nemoe_jax.text.data.formats import Completion
from nemoe_jax.text.data.messages import BadRow
from tests.support.train_runs import log_of, make_workplace, write_recipe
from train.cli import main
from train.data.loader import open_corpus
from train.data.preference_rows import to_pair
from train.recipe import Preference, read_recipe
from train.run.loop import train
from train.run.prepare import load, resolve, trainable_of
from train.run.reference import fingerprint, with_reference
from train.step.preference import PreferenceObjective, make_objective
from train.step.preference_loss import PairLogprobs, preference_loss
from train.step.step import combine

RNG = np.random.default_rng(0)
ROWS = [
    {
        "prompt": f"{n}+{n}=",
        "chosen": f"{2 * n}.",
        "rejected": f"{2 * n + 7} or so",
        "score_chosen": 8,
        "score_rejected": n,
    }
    for n in range(7)
]
LENGTH = 64


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    place = tmp_path_factory.mktemp("workplace")
    make_workplace(place)
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (place / "held_out_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    return place


@pytest.fixture
def write(workplace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(loss="dpo", **keys):
        data = {
            "cache": str(workplace / "cache"),
            "train": str(workplace / "pairs.jsonl"),
            "held_out": {"files": str(workplace / "held_out_pairs.jsonl")},
            "sequence_length": LENGTH,
            "batch_size": 2,
        }
        keys = {"distill": None, "preference": {"loss": loss}, "data": data, "output": str(tmp_path / "out")} | keys
        return write_recipe(tmp_path / f"{loss}.yaml", workplace, "repair", **keys)

    return write


def pair_of(prompt="2+2=", chosen="4", rejected="5"):
    user, (good, bad) = (
        {"role": "user", "content": prompt},
        ([{"role": "assistant", "content": t}] for t in (chosen, rejected)),
    )
    return user, good, bad


def test_rows_of_trl_and_ultrafeedback_are_the_same_pair():
    user, good, bad = pair_of()
    rows = [
        {"prompt": [user], "chosen": good, "rejected": bad},
        {"chosen": [user, *good], "rejected": [user, *bad]},
        {
            "prompt": "2+2=",
            "chosen": [user, *good],
            "rejected": [user, *bad],
            "score_chosen": 9.0,
            "score_rejected": 2.0,
        },
        {"prompt": "2+2=", "chosen": good, "rejected": bad},
        {"prompt": [user], "chosen": "4", "rejected": "5"},
        {
            "instruction": "2+2=",
            "completions": [
                {"response": "5", "overall_score": 2.0},
                {"response": "4", "overall_score": 9.0},
                {"response": "four?", "overall_score": 7.0},
            ],
        },
    ]
    pairs = [to_pair(row) for row in rows]
    for pair in pairs:
        assert (pair.chosen, pair.rejected) == (pairs[0].chosen, pairs[0].rejected)
        assert [message["content"] for message in pair.chosen.messages] == ["2+2=", "4"]
    assert [pair.scores for pair in pairs] == [None, None, (9.0, 2.0), None, None, (9.0, 2.0)]
    texts = {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}
    assert to_pair(texts)[:2] == (Completion("2+2=", " 4"), Completion("2+2=", " 5"))
    implicit = {"chosen": "Q: 2+2= A: 4", "rejected": "Q: 2+2= A: 5"}
    assert to_pair(implicit)[:2] == (Completion("Q: 2+2= A:", " 4"), Completion("Q: 2+2= A:", " 5"))


def test_of_a_conversation_only_the_last_response_is_learned():
    user, good, bad = pair_of()
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    pair = to_pair({"chosen": [*before, user, *good], "rejected": [*before, user, *bad]})
    assert [message.get("weight") for message in pair.chosen.messages if message["role"] == "assistant"] == [0, None]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b"}, "expected the keys chosen and rejected, got prompt, chosen"),
        ({"chosen": "yes", "rejected": "no"}, "prompt: expected one"),
        ({"prompt": "a", "chosen": "b", "rejected": pair_of()[2]}, "expected two texts or two lists"),
        ({"instruction": "a", "completions": [{"response": "b", "overall_score": 3}] * 2}, "different values"),
        ({"text": "a"}, "expected the keys chosen and rejected"),
        ("a", "expected an object"),
    ],
)
def test_rows_that_hold_no_pair_are_named(row, expected):
    with pytest.raises(BadRow, match=expected):
        to_pair(row)


def random_logprobs(pairs=5, group=3):
    sums = [-RNG.uniform(1, 9, (pairs, group)).astype(np.float32) for _ in range(3)]
    tokens = RNG.integers(2, 9, (pairs, group)).astype(np.float32)
    scores = RNG.uniform(0, 9, (pairs, group)).astype(np.float32)
    return PairLogprobs(*sums[:2], sums[2], tokens, tokens + 3, scores, np.ones(pairs, bool))


def test_rpo_is_zero_where_the_margin_is_the_scores_difference_and_dpo_s_where_that_is_endless():
    pairs = random_logprobs()
    ratio = pairs.response_PG - pairs.reference_PG
    margin = 0.1 * (ratio[:, 0] - ratio[:, 1])
    options = Preference(loss="rpo", reward_scale=2.0)
    matching = pairs._replace(scores_PG=np.stack([margin / 2, 0 * margin, 0 * margin], 1))
    assert abs(preference_loss(options, matching)[0]) < 1e-6
    endless = pairs._replace(scores_PG=np.stack([margin * 0 + 50, 0 * margin, 0 * margin], 1))
    dpo = preference_loss(Preference(loss="dpo"), pairs)[0]
    assert preference_loss(options, endless)[0] == pytest.approx(float(dpo), rel=1e-5)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    p, q = sigmoid(2 * (pairs.scores_PG[:, 0] - pairs.scores_PG[:, 1])), sigmoid(margin)
    expected = np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert preference_loss(options, pairs)[0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "kto", "rpo"])
def test_filling_changes_nothing(loss):
    pairs = random_logprobs()
    filled = PairLogprobs(*(np.concatenate([array, 0 * array[:2]]) for array in pairs))
    options = Preference(loss=loss, sft_weight=0.1)
    (value, figures), gradient = jax.value_and_grad(
        lambda p: preference_loss(options, pairs._replace(response_PG=p)), has_aux=True
    )(pairs.response_PG)
    (value_, figures_), gradient_ = jax.value_and_grad(
        lambda p: preference_loss(options, filled._replace(response_PG=p)), has_aux=True
    )(filled.response_PG)
    np.testing.assert_allclose(value, value_, rtol=1e-6)
    for name, figure in figures.items():
        np.testing.assert_allclose(figure, figures_[name], rtol=1e-6)
    np.testing.assert_allclose(gradient, gradient_[:5], rtol=1e-5, atol=1e-7)
    assert not gradient_[5:].any()


def prepared(recipe):
    """(objective, trainable whose adapters have moved, frozen, a batch with the reference's log-probabilities)."""
    inputs, phase = resolve(recipe), recipe.phases[0]
    params = load(recipe, inputs.config, None)
    trainable, frozen = trainable_of(recipe, phase, inputs.config, inputs.targets[0], params, None)
    objective = make_objective(recipe, phase, inputs.config, None)
    corpus = open_corpus(
        phase.data.train, phase.data, inputs.tokenizer, inputs.config.vocab, preference=phase.preference
    )
    if phase.preference.has_reference:
        with_reference(objective, trainable, frozen, corpus, [], None)
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda array: array + 0.05 * rng.normal(size=array.shape).astype("f4"), trainable)
    batch = next(corpus.iterator(phase.data.batch_size, 0))
    return objective, moved, frozen, type(batch)(*map(jnp.asarray, batch))


def plain_loss(objective, trainable, frozen, batch):
    """The loss with the logits of all tokens at once, segment by segment."""
    params, batch = combine(trainable["params"], frozen), type(batch)(*map(np.asarray, batch))
    options = {"adapters": trainable["adapters"], "positions": batch.positions, "segments": batch.segments}
    logits = forward(objective.config, params, batch.inputs, **options).logits
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
    group = 3 if objective.phase.preference.loss == "kto" else 2
    own_BTS = batch.segments[..., None] == np.arange(batch.reference.shape[1]) + 1
    kept = (np.arange(own_BTS.shape[-1] // group) < batch.items[:, None]).reshape(-1)

    def per_pair(values_BT):
        values_BS = jnp.where(own_BTS, jnp.where(batch.mask > 0, values_BT, 0)[..., None], 0).sum(1)
        return values_BS.reshape(-1, group)[kept]

    response, text = batch.mask == 1, batch.mask > 0
    sums = (per_pair(mask * logprobs) for mask in (response, text))
    counts = (per_pair(mask * 1.0) for mask in (response, text))
    reference, scores = (array.reshape(-1, group)[kept] for array in (batch.reference, batch.scores))
    return preference_loss(
        objective.phase.preference, PairLogprobs(*sums, reference, *counts, scores, np.ones(kept.sum(), bool))
    )[0]


def test_the_gradient_is_that_of_the_plain_loss(write):
    recipe = read_recipe(write("kto"), ["logits_chunk=16", "preference.sft_weight=0.3"])
    objective, trainable, frozen, batch = prepared(recipe)
    (value, parts), gradient = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))(trainable, frozen, None, batch)
    expected, gradient_ = jax.jit(jax.value_and_grad(lambda *a: plain_loss(objective, *a, batch)))(trainable, frozen)
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert {"balance_loss", "accuracy", "reward_margin"} <= set(parts)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * float(jnp.abs(other).max()))


class Scorer:
    """A transformers model as TRL calls it: per-token log-probabilities of the labels, 0 where there is none."""

    def __init__(self, directory):
        transformers = pytest.importorskip("transformers")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
        self.training = True

    def __call__(self, input_ids, attention_mask, labels, **_):
        import torch

        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        labels = labels[:, 1:]
        logprobs = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        zeros = torch.zeros_like(logprobs)
        return types.SimpleNamespace(
            logits=logits, log_probs=logprobs * (labels >= 0), entropy=zeros, mean_logits=zeros, is_top1=zeros > 0
        )


def padded(batch, slots):
    """(tokens, attention mask, response mask) of those slots of all rows, one sequence in each line, for torch."""
    import torch

    sequences = []
    for row in range(len(batch.inputs)):
        for slot in slots:
            own = np.asarray(batch.segments[row]) == slot + 1
            if own.any():
                sequences.append((np.asarray(batch.inputs[row])[own], np.asarray(batch.mask[row])[own] == 1))
    arrays = np.zeros((3, len(sequences), LENGTH), np.int64)
    for line, (tokens, targets) in enumerate(sequences):
        arrays[0, line, : len(tokens)], arrays[1, line, : len(tokens)] = tokens, 1
        arrays[2, line, 1 : len(tokens)] = targets[:-1]
    return [torch.from_numpy(array) for array in arrays]


def of_trl(loss, policy, reference, batch, group):
    """TRL's loss on the batch's pairs, the log-probabilities from transformers."""
    import torch
    from trl import DPOTrainer, KTOTrainer
    from trl.experimental.orpo import ORPOTrainer

    count = int(batch.items.max())
    sides = [padded(batch, range(side, group * count, group)) for side in range(group)]
    tokens, attention, response = (torch.cat(arrays) for arrays in zip(*sides[:2], strict=True))
    accelerator = types.SimpleNamespace(
        gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu", unwrap_model=lambda x: x
    )
    common = {
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "beta": 0.1,
        "_metrics": collections.defaultdict(lambda: collections.defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "model": policy,
        "ref_model": reference,
        "args": types.SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
        "precompute_ref_logps": True,
    }

    def trainer(kind, **attributes):
        made = object.__new__(kind)
        made.__dict__.update(common | attributes)
        return made

    def logps(model, arrays):
        tokens, attention, response = arrays
        return model(tokens, attention, tokens.masked_fill(response == 0, -100)).log_probs.sum(1)

    with torch.no_grad():
        references = [logps(reference, side) for side in sides]
        batch = {"input_ids": tokens, "attention_mask": attention, "completion_mask": response}
        if loss in ("dpo", "ipo"):
            kind = {"dpo": "sigmoid", "ipo": "ipo"}[loss]
            made = trainer(
                DPOTrainer,
                ld_alpha=None,
                f_divergence_type="reverse_kl",
                loss_types=[kind, "sft"],
                loss_weights=[1.0, 0.3],
                label_smoothing=0.0,
                use_weighting=False,
            )
            batch |= {"ref_chosen_logps": references[0], "ref_rejected_logps": references[1]}
            return made._compute_loss(policy, batch, False), references
        if loss == "kto":
            made = trainer(KTOTrainer, loss_type="kto", calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
            pairs = len(references[0])
            batch |= {"label": torch.arange(2 * pairs) < pairs, "ref_logps": torch.cat(references[:2])}
            names = ("KL_input_ids", "KL_attention_mask", "KL_completion_mask")
            batch |= dict(zip(names, sides[2], strict=True)) | {"ref_KL_logps": references[2]}
            return made._compute_loss(policy, batch, False), references
        means = [logps(policy, side) / side[2].sum(1) for side in sides]
        losses = trainer(ORPOTrainer).odds_ratio_loss(*means)[0]
        chosen, attention, _ = sides[0]
        labels = chosen.masked_fill(attention == 0, -100)
        logits = policy(chosen, attention, labels).logits
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        return nll - losses.mean(), references


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "kto"])
def test_losses_equal_trl_s(write, tmp_path, loss):
    pytest.importorskip("trl")
    recipe = read_recipe(write(loss), ["preference.sft_weight=0.3"] if loss in ("dpo", "ipo") else [])
    objective, trainable, frozen, batch = prepared(recipe)
    merged = lora.merge(objective.config, combine(trainable["params"], frozen), trainable["adapters"])
    pretrained.save_pretrained(tmp_path / "policy", objective.config, merged)
    group = 3 if loss == "kto" else 2
    expected, references = of_trl(loss, Scorer(tmp_path / "policy"), Scorer(recipe.model), batch, group)
    value, _ = jax.jit(objective.loss)(trainable, frozen, None, batch)
    assert value == pytest.approx(float(expected), abs=1e-5)
    if loss != "orpo":
        for side, logps in enumerate(references):
            ours = np.concatenate(
                [row[side::group][:count] for row, count in zip(batch.reference, batch.items, strict=True)]
            )
            np.testing.assert_allclose(ours, logps, rtol=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_run_learns_to_prefer_and_keeps_the_reference(write, workplace, loss, monkeypatch):
    report = train(read_recipe(write(loss), ["steps=6", "balance_loss_weight=0.01"]))
    lines = [line for line in log_of(Path("out")) if "loss" in line]
    start = {"dpo": np.log(2), "kto": 0.5}[loss]
    assert lines[0]["loss"] == pytest.approx(start + 0.01 * lines[0]["balance_loss"], abs=1e-5)
    assert lines[0]["reward_margin"] == pytest.approx(0, abs=1e-5) and lines[-1]["reward_margin"] > 0.01
    assert report.after.loss < report.before.loss and report.after.accuracy == 1 and report.after.perplexity is None
    assert report.phases[0].data[0].documents == 2 * len(ROWS)
    assert list((workplace / "cache" / "reference").glob("*.npy"))

    def never(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(PreferenceObjective, "response_logprobs", never)
    recipe = read_recipe(write(loss), ["output=again", "steps=2", "data.held_out=[]"])
    train(recipe)
    again = [line for line in log_of(Path("again")) if "loss" in line]
    assert again[0]["loss"] == pytest.approx(lines[0]["loss"] - 0.01 * lines[0]["balance_loss"], abs=1e-6)


def test_the_fingerprint_sees_values_and_places():
    array = jnp.asarray(RNG.normal(size=(3, 4)), jnp.bfloat16)
    prints = [fingerprint({"a": value}) for value in (array, array[::-1], array.at[0, 0].add(1), array.T)]
    assert len(set(prints)) == 4 and fingerprint({"a": array + 0}) == prints[0]


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["data.train=same.jsonl"], "chosen and rejected are the same"),
        (["data.sequence_length=8"], "no pair fits a row of 8 tokens; the shortest takes 21"),
        (
            ["model=OTHER", "train_router=false", "lora=[{pattern: blocks/*}]", "tokenizer=WIDE"],
            "expected at most the model's",
        ),
        (["preference.loss=rpo", "data.train=unscored.jsonl"], "expected score_chosen and score_rejected"),
        (["preference.loss=kto", "data.train=unscored.jsonl"], "expected at least two pairs"),
        (["preference.loss=ppo"], "preference.loss: expected 'dpo', 'ipo', 'orpo', 'kto' or 'rpo', got 'ppo'"),
        (["distill.teacher=OTHER"], "preference: expected no distill beside it"),
        (["data.train.format=messages"], "data.train.0.format: expected auto"),
    ],
)
def test_bad_input_is_one_line_and_status_2(write, workplace, tmp_path, capsys, overrides, expected):
    (tmp_path / "same.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}))
    (tmp_path / "unscored.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    recipe = write(data=data_of(workplace))
    config = json.loads((workplace / "other" / "config.json").read_text())
    narrow = tmp_path / "narrow"
    if any("OTHER" in override for override in overrides):
        shutil.copytree(workplace / "other", narrow)
        (narrow / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    words = {"OTHER": str(narrow), "WIDE": str(workplace / "tekken.json")}
    for name, value in words.items():
        overrides = [override.replace(name, value) for override in overrides]
    assert main(["run", str(recipe), *overrides]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith("error: ") and error.count("\n") == 1
    assert not Path("out").exists()


def data_of(workplace):
    return {
        "cache": str(workplace / "cache"),
        "train": {"files": str(workplace / "pairs.jsonl")},
        "sequence_length": LENGTH,
        "batch_size": 2,
    }


@pytest.mark.parametrize("preference", [None, "dpo"])
def test_a_program_whose_work_is_counted_differs_in_that_alone(preference):
    plain, counted = (
        make_objective(None, types.SimpleNamespace(preference=preference), None, None, way) for way in (False, True)
    )
    assert counted == dataclasses.replace(plain, all_count=True) != plain
