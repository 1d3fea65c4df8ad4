"""Training end to end on tiny models: what learns, what must not, what is written and what is left behind."""

import dataclasses
import itertools
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax.adapters.lora import with_dropout
from nemoe_jax.checkpoints import pretrained, reader
from nemoe_jax.spec import schema
from nemoe_jax.spec.schema import leaves
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.compiled import forward
from tests.support.train_runs import CONTROL, DENSE, MIXTURE, TEXT, log_of, make_workplace, random_params, write_recipe
from train.cli import main
from train.data.loader import Batch
from train.recipe import Recipe, read_recipe
from train.run.loop import train
from train.run.metrics_logger import MetricsLogger
from train.run.prepare import load, resolve, routers_scale, trainable_of
from train.run.teacher import share_weights
from train.step.optimizer import learning_rate_schedule, make_optimizer
from train.step.step import Objective, combine, initial_state, make_update, split


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    place = tmp_path_factory.mktemp("workplace")
    make_workplace(place)
    return place


@pytest.fixture
def write(workplace, tmp_path, monkeypatch):
    """Writes a recipe over the workplace and returns its path; the run's own paths are under tmp_path."""
    monkeypatch.chdir(tmp_path)
    return lambda name, **keys: write_recipe(
        tmp_path / f"{name}.yaml", workplace, name, **{"output": str(tmp_path / "out")} | keys
    )


def losses_of(output: Path) -> list[float]:
    return [line["loss"] for line in log_of(output) if "loss" in line]


def ready(recipe: Recipe):
    """(objective, state, frozen, update) of a recipe's first phase, without the loop."""
    inputs, phase = resolve(recipe), recipe.phases[0]
    params = load(recipe, inputs.config, None)
    optimizer = make_optimizer(phase.optimizer, phase.steps, routers_scale(phase, params, None))
    trainable, frozen = trainable_of(recipe, phase, inputs.config, inputs.targets[0], params, None)
    objective = Objective(recipe, phase, inputs.config, inputs.teachers[0])
    state = initial_state(trainable, optimizer, phase.seed)
    update = make_update(objective, optimizer, learning_rate_schedule(phase.optimizer, phase.steps), state)
    return objective, state, frozen, update


def batch_of(rows: int = 4, documents: tuple[int, ...] = (32,), seed: int = 0) -> Batch:
    """Random tokens, each row cut into documents of those lengths; all but a document's last have targets."""
    tokens = np.random.default_rng(seed).integers(CONTROL, CONTROL + 256, (rows, sum(documents) + 1)).astype("i4")
    lengths = np.array(documents)
    segments = np.repeat(np.arange(len(lengths)) + 1, lengths)
    positions = np.concatenate([np.arange(length) for length in documents])
    mask = np.append(segments[1:] == segments[:-1], False)
    whole = [np.broadcast_to(array, (rows, len(array))) for array in (mask, segments, positions)]
    mask, segments, positions = (jnp.asarray(array) for array in whole)
    return Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), mask.astype(jnp.float32), segments, positions)


def test_scratch_run_learns_and_its_output_is_a_model(write, workplace, capsys):
    assert main(["run", str(write("scratch")), "steps=30", "eval_every=20", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    output = Path("out")
    report = json.loads((output / "report.json").read_text())
    (phase,) = report.pop("phases")
    assert report == figures and phase["accepted"] and phase["data"][0]["documents"] == len(TEXT) - 3
    assert figures["held_out_loss_before"] == pytest.approx(np.log(276), abs=1)
    assert figures["held_out_loss_after"] < 3.5
    assert figures["params_trained"] == figures["params_total"] == schema.count(DENSE)[0]
    assert figures["tokens"] == 30 * 4 * 32 and figures["tokens_per_second"] > 0

    log = log_of(output)
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 31))
    assert [line["step"] for line in log if "held_out_loss" in line] == [0, 20, 30]
    assert log[-1]["held_out_loss"] == figures["held_out_loss_after"]
    assert [line["learning_rate"] for line in log if "loss" in line][:3] == pytest.approx([5e-3, 1e-2, 1e-2])

    config, params = pretrained.load_pretrained(output)
    assert config == DENSE.replace(bos_token_id=1, eos_token_id=2)
    assert held_out_loss(config, params, workplace) == pytest.approx(figures["held_out_loss_after"], abs=1e-5)
    assert load_tokenizer(output).encode("ab") == [CONTROL + 97, CONTROL + 98]
    assert read_recipe(output / "recipe.yaml").phases[0].steps == 30
    assert sorted(path.name for path in Path().iterdir()) == ["out", "scratch.yaml"]


def test_a_run_of_one_step_reports_no_speed(write, capsys):
    keys = ["steps=1", "optimizer.warmup_steps=0", "eval_every=0"]  # the first step compiles
    assert main(["run", str(write("scratch")), *keys, "--json"]) == 0
    assert "tokens_per_second" not in json.loads(capsys.readouterr().out)
    (phase,) = json.loads(Path("out/report.json").read_text())["phases"]
    assert phase["steps"] == 1 and "tokens_per_second" not in phase


def held_out_loss(config, params, workplace) -> float:
    """Mean −log p over the held-out text's rows, in NumPy; its one document is cut every 32 tokens."""
    tokenizer = load_tokenizer(workplace)
    stream = np.array(tokenizer.encode_document((workplace / "held_out.txt").read_text()))
    rows = [stream[start : start + 32] for start in range(0, len(stream), 32)]
    chosen = np.linspace(0, len(rows) - 1, min(8, len(rows))).round().astype(int)
    total = count = 0
    for number in chosen:
        inputs, after = rows[number], stream[32 * number + 1 : 32 * number + 33]
        logits = np.asarray(forward(config, params, jnp.asarray(inputs[None])).logits[0], np.float64)[: len(after)]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= np.take_along_axis(log_probs, after[:, None], -1).sum()
        count += len(after)
    return total / count


def test_lora_repair_learns_and_merges(write, workplace):
    before = {path.name: path.read_bytes() for path in (workplace / "mixture").iterdir()}
    report = train(read_recipe(write("repair"), ["steps=25"]))
    lines = [line for line in log_of(Path("out")) if "loss" in line]
    assert lines[-1]["kl"] < 0.7 * lines[0]["kl"]
    assert lines[0]["loss"] == pytest.approx(lines[0]["kl"]) and lines[0]["balance_loss"] >= 0.99
    assert report.params_trained < 0.5 * report.params_total
    load_LE = report.after.expert_load
    assert np.shape(load_LE) == (2, 4) and np.sum(load_LE) == pytest.approx(2, abs=1e-4)

    config, params = pretrained.load_pretrained("out")
    assert config == MIXTURE
    assert held_out_loss(config, params, workplace) == pytest.approx(report.after.loss, abs=1e-4)
    base, changed = leaves(pretrained.load_pretrained(workplace / "mixture")[1]), leaves(params)
    targeted = {path for path in base if "/attn/" in path or "/ffn/" in path}
    assert {path for path in base if (np.asarray(base[path]) != np.asarray(changed[path])).any()} == targeted
    assert {path.name: path.read_bytes() for path in (workplace / "mixture").iterdir()} == before


def test_updates_reach_every_adapter_and_the_router_and_nothing_else(write):
    _, state, frozen, update = ready(read_recipe(write("repair", distill=None)))
    first = jax.tree.map(np.asarray, state.trainable)
    kept = {path: np.array(array) for path, array in frozen.items()}
    assert list(first["params"]) == ["blocks/moe/ffn/router"]
    assert set(frozen) == set(leaves(schema.declare(MIXTURE))) - set(first["params"])
    for _ in range(2):  # B is zero at first, so that A moves only from the second step on
        state, figures = update(state, frozen, None, batch_of())
    assert figures["gradient_norm"] > 0 and update._cache_size() == 1  # compiled once
    for path, array in frozen.items():
        np.testing.assert_array_equal(array, kept[path], err_msg=path)
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(state.trainable), strict=True
    ):
        moved = np.abs(np.asarray(new) - old).reshape(len(old), -1).max(axis=1)
        assert (moved > 0).all(), jax.tree_util.keystr(path)  # in every layer
    router = first["params"]["blocks/moe/ffn/router"]
    step = np.abs(np.asarray(state.trainable["params"]["blocks/moe/ffn/router"]) - router).max()
    assert 0 < step < 0.1 * router.std()  # not wiped out by Adam


def test_an_adapter_of_the_head_drops_other_elements_in_each_chunk(write):
    """Two chunks of the same tokens: their losses are alike without dropout only, once B is not zero."""
    losses = {}
    for dropout in (0.0, 0.5):
        lora = [{"pattern": "head", "rank": 2, "dropout": dropout}]
        objective, state, frozen, update = ready(read_recipe(write("repair", distill=None, lora=lora, logits_chunk=32)))
        batch = batch_of(1, (32,))
        for _ in range(2):
            state, _ = update(state, frozen, None, batch)
        moved = state.trainable["adapters"]["head"]
        assert np.abs(moved.b).max() > 0
        keyed = state.trainable | {"adapters": with_dropout(state.trainable["adapters"], jax.random.key(1))}
        once, twice = (Batch(*(jnp.tile(array, (times, 1)) for array in batch)) for times in (1, 2))
        whole = jax.jit(objective.loss)
        losses[dropout] = [float(whole(keyed, frozen, None, rows)[1]["cross_entropy"]) for rows in (once, twice)]
    assert losses[0.0][0] == pytest.approx(losses[0.0][1], rel=1e-6)
    assert losses[0.5][0] != pytest.approx(losses[0.5][1], rel=1e-6)


def test_without_train_router_only_adapters_learn(write):
    _, state, frozen, _ = ready(read_recipe(write("repair", train_router=False)))
    assert state.trainable["params"] == {} and "blocks/moe/ffn/router" in frozen


def test_split_and_combine_are_inverse():
    params = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), random_params(MIXTURE))
    trained, frozen = split(params, lambda path: path.endswith("router"), "bfloat16")
    assert trained["blocks/moe/ffn/router"].dtype == jnp.float32 and frozen["embed"].dtype == jnp.bfloat16
    for path, array in leaves(combine(trained, frozen)).items():
        np.testing.assert_array_equal(np.asarray(array, np.float32), np.asarray(leaves(params)[path], np.float32))


def test_the_loss_is_the_weighted_sum_and_zero_against_itself(write, workplace):
    recipe = read_recipe(
        write("repair"),
        ["distill.kl_weight=0.7", "distill.ce_weight=0.2", "balance_loss_weight=0.3", "z_loss_weight=0.01"],
    )
    objective, state, frozen, _ = ready(recipe)
    teacher = pretrained.load_pretrained(workplace / "dense")[1]
    total, parts = jax.jit(objective.loss)(state.trainable, frozen, teacher, batch_of())
    expected = 0.7 * parts["kl"] + 0.2 * parts["cross_entropy"] + 0.3 * parts["balance_loss"] + 0.01 * parts["z_loss"]
    assert total == pytest.approx(float(expected), rel=1e-6) and parts["kl"] > 0.1

    falling = ["distill.final_kl_weight=0.1", "distill.temperature=3", "distill.final_temperature=1", "steps=5"]
    objective, *_ = ready(read_recipe(write("repair"), falling))
    at = [objective.loss(state.trainable, frozen, teacher, batch_of(), step) for step in (0, 2, 4, 9)]
    for (total, parts), weight in zip(at, (1.0, 0.55, 0.1, 0.1), strict=True):
        assert total == pytest.approx(weight * float(parts["kl"]), rel=1e-5)
    assert at[2][1]["kl"] == pytest.approx(float(at[3][1]["kl"])) != pytest.approx(float(at[0][1]["kl"]))

    itself = read_recipe(write("repair"), [f"distill.teacher={workplace / 'mixture'}"])
    objective, state, frozen, _ = ready(itself)
    total, _ = jax.jit(objective.loss)(
        state.trainable, frozen, pretrained.load_pretrained(workplace / "mixture")[1], batch_of()
    )
    assert abs(float(total)) < 1e-6


def test_what_teacher_and_student_share_is_held_once():
    dense, mixture = random_params(DENSE), leaves(random_params(MIXTURE, seed=1))
    for name in ("embed", "norm", "blocks/moe/attn_norm", "blocks/moe/attn/q"):
        mixture[name] = leaves(dense)[name.replace("/moe/", "/dense/")] + 0
    frozen = {path: jnp.asarray(array) for path, array in mixture.items() if path != "norm"}  # which learns
    teacher, saved = share_weights(jax.tree.map(jnp.asarray, dense), frozen)
    shared = {path for path, array in leaves(teacher).items() if any(array is own for own in frozen.values())}
    norms = {path for path in leaves(dense) if path.endswith("ffn_norm")}  # ones in both
    assert shared - norms == {"embed", "blocks/dense/attn_norm", "blocks/dense/attn/q"}
    assert saved == sum(leaves(dense)[path].nbytes for path in shared)
    for path, array in leaves(teacher).items():
        np.testing.assert_array_equal(array, leaves(dense)[path])


def test_documents_of_a_row_do_not_see_each_other(write):
    objective, state, frozen, _ = ready(read_recipe(write("scratch")))
    lengths = (13, 13, 6)
    packed = batch_of(1, lengths)
    held_out = jax.jit(objective.held_out)
    whole = held_out(state.trainable, frozen, packed)
    ends = np.cumsum((0, *lengths))
    alone = [
        held_out(state.trainable, frozen, Batch(*(array[:, start:stop] for array in packed)))
        for start, stop in itertools.pairwise(ends)
    ]
    assert whole["weight"] == sum(part["weight"] for part in alone) == 29
    assert whole["loss"] == pytest.approx(float(sum(part["loss"] for part in alone)), rel=1e-5)


def test_masked_targets_and_padding_do_not_count(write):
    objective, state, frozen, _ = ready(read_recipe(write("repair")))
    batch = batch_of(4)
    masked = dataclasses.replace(batch, mask=batch.mask.at[2:].set(0), segments=batch.segments.at[2:].set(0))
    whole = jax.jit(objective.held_out)(state.trainable, frozen, masked)
    half = jax.jit(objective.held_out)(state.trainable, frozen, Batch(*(array[:2] for array in batch)))
    assert whole["weight"] == half["weight"] == 62 and whole["loss"] == pytest.approx(float(half["loss"]), rel=1e-5)
    np.testing.assert_allclose(whole["load"], half["load"], rtol=1e-5)


@pytest.mark.parametrize("keys", [{}, {"distill": None, "balance_loss_weight": 0.1}])
def test_accumulated_parts_make_the_step_of_the_whole(write, workplace, keys):
    teacher = pretrained.load_pretrained(workplace / "dense")[1] if "distill" not in keys else None
    batch = batch_of(4, (20, 12))
    batch = dataclasses.replace(batch, mask=batch.mask.at[0, :15].set(0))  # parts with unlike numbers of targets
    after = {}
    for parts in (1, 2):
        _, state, frozen, update = ready(
            read_recipe(write("repair", **keys), [f"data.gradient_accumulation_steps={parts}"])
        )
        state, figures = update(state, frozen, teacher, batch)
        after[parts] = state.trainable["adapters"], figures
    names = ("loss", "cross_entropy", "gradient_norm") if teacher else ("cross_entropy",)  # balance is of each part
    for name in names:
        assert after[1][1][name] == pytest.approx(float(after[2][1][name]), rel=1e-4)
    if teacher:
        for one, two in zip(*(jax.tree.leaves(after[parts][0]) for parts in (1, 2)), strict=True):
            np.testing.assert_allclose(one, two, atol=2e-3)  # Adam's first step is the gradient's sign times 5e-3
            assert np.mean(np.abs(one - two) > 1e-4) < 0.01


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(write):
    _, state, frozen, update = ready(read_recipe(write("repair", distill=None)))
    state, _ = update(state, frozen, None, batch_of())
    before = jax.tree.map(np.array, state)
    spoilt = frozen | {"norm": frozen["norm"].at[0].set(jnp.nan)}
    state, figures = update(state, spoilt, None, batch_of())
    assert figures["skipped"] and (state.step, state.skipped) == (2, 1)
    for old, new in zip(jax.tree.leaves(before.trainable), jax.tree.leaves(state.trainable), strict=True):
        np.testing.assert_array_equal(old, new)
    for old, new in zip(jax.tree.leaves(before.optimizer_state), jax.tree.leaves(state.optimizer_state), strict=True):
        np.testing.assert_array_equal(old, new)
    state, figures = update(state, frozen, None, batch_of())
    assert not figures["skipped"] and state.skipped == 1


def test_the_router_alone(write):
    _, state, frozen, _ = ready(read_recipe(write("repair", trainable="router", lora=[], train_router=False)))
    assert list(state.trainable["params"]) == ["blocks/moe/ffn/router"] and state.trainable["adapters"] == {}
    assert set(frozen) == set(leaves(schema.declare(MIXTURE))) - {"blocks/moe/ffn/router"}


def test_named_weights_alone(write, capsys):
    recipe = write("repair", trainable="weights", weights=["blocks/moe/ffn/*"], lora=[], train_router=False)
    _, state, frozen, _ = ready(read_recipe(recipe))
    names = {path for path in leaves(schema.declare(MIXTURE)) if path.startswith("blocks/moe/ffn/")}
    assert set(state.trainable["params"]) == names and len(names) == 4 and not set(frozen) & names
    assert main(["run", str(recipe), "weights=blocks/dense/*"]) == 2
    assert "weights: blocks/dense/* matches no weight" in capsys.readouterr().err
    assert main(["run", str(recipe), "trainable=all"]) == 2
    assert "weights: expected globs with trainable: weights alone" in capsys.readouterr().err


def test_the_seed_decides_everything(write):
    recipe = write("scratch")
    runs = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert main(["run", str(recipe), "steps=4", f"seed={seed}", f"output={name}", "save_dtype=bfloat16"]) == 0
        runs[name] = losses_of(Path(name))
        assert reader.read_config(name).dtype == "bfloat16"
    assert runs["a"] == runs["b"] and runs["a"] != runs["c"]


def test_master_weights_are_float32_and_saved_in_save_dtype(write):
    recipe = read_recipe(write("scratch"), ["dtype=bfloat16", "steps=3", "remat=true"])
    _, state, frozen, _ = ready(recipe)
    assert {array.dtype for array in jax.tree.leaves(state.trainable)} == {np.dtype("float32")} and not frozen
    train(recipe)
    assert reader.read_config("out").dtype == "bfloat16" == pretrained.load_pretrained("out")[1]["embed"].dtype


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["output=."], "output: . already exists"),
        (["model=missing"], "missing: no such"),
        (["distill.teacher=missing"], "missing: no such"),
        (["data.train=missing.txt"], "missing.txt: no text there"),
        (["data.train=empty.txt"], "empty.txt: text: empty"),
        (
            ["data.sequence_length=65"],
            "data.sequence_length: expected at most the model's context of 64 tokens, got 65",
        ),
        (["lora.0.pattern=blocks/*/attention"], "LoRA target blocks/*/attention matches no weight"),
        (["mesh=fsdp=3,rows=2"], "unknown axis 'rows'"),
        (["mesh=fsdp=3"], "mesh fsdp 3 does not divide batch of 4"),
        (["mesh=fsdp=2"], "wants 2 devices"),
        (["distill.teacher=OTHER"], "other: expected the model's vocabulary of 276, got 300"),
        (["model=OTHER", "train_router=false"], "distill.teacher: "),
        (["model=OTHER", "train_router=true", "lora=[{pattern: blocks/*}]"], "vocabulary of 300"),
        (["stepz=3"], "nearest known key is steps"),
        (["output=empty.txt/out"], "output: "),
        (["data.train=chat.jsonl", "data.sequence_length=8"], "data.train: no token to be predicted in its rows"),
        (["data.held_out=chat.jsonl", "data.sequence_length=8"], "data.held_out: no token to be predicted"),
    ],
)
def test_bad_input_is_one_line_status_2_and_leaves_nothing(write, workplace, tmp_path, capsys, overrides, expected):
    recipe = write("repair", output="new/deep/out")
    (tmp_path / "empty.txt").write_text("\n")
    chat = [{"role": "user", "content": "a long question"}, {"role": "assistant", "content": "short"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    overrides = [override.replace("OTHER", str(workplace / "other")) for override in overrides]
    assert main(["run", str(recipe), *overrides]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == before and captured.out == ""


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, 130), (OSError, None)])
def test_an_interrupted_run_leaves_nothing(write, tmp_path, monkeypatch, capsys, error, status):
    def stop(self, done, figures):
        if done == 3:
            raise error

    monkeypatch.setattr(MetricsLogger, "step", stop)
    arguments = ["run", str(write("scratch", output="new/out"))]
    if status is None:
        with pytest.raises(error):
            main(arguments)
    else:
        assert main(arguments) == status
    assert [path.name for path in tmp_path.iterdir()] == ["scratch.yaml"]


def test_on_a_mesh_the_losses_are_the_same(write, workplace):
    distill = {"teacher": str(workplace / "dense"), "feature_loss": "l2", "feature_of": ["ffn", "attention"]}
    lora = [{"pattern": "blocks/moe/*/[qd]*", "rank": 4}]
    recipe = write("repair", steps=3, distill=distill, lora=lora, router_bias_rate=1e-4)
    assert main(["run", str(recipe), "output=one"]) == 0
    assert main(["run", str(recipe), "output=eight", "mesh=fsdp=2,expert=2,tensor=2"]) == 0
    np.testing.assert_allclose(losses_of(Path("eight")), losses_of(Path("one")), rtol=1e-5)
    assert json.loads(Path("eight/report.json").read_text())["held_out_loss_after"] == pytest.approx(
        json.loads(Path("one/report.json").read_text())["held_out_loss_after"], rel=1e-5
    )


def test_weights_and_biases_get_the_figures_where_they_are_installed(write, monkeypatch, capsys):
    logged = []
    run = types.SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **keys: run))
    assert main(["run", str(write("scratch")), "steps=3", "wandb=project", "data.held_out=[]"]) == 0
    assert [step for step, _ in logged] == [1, 2, 3]
    assert [numbers["train/loss"] for _, numbers in logged] == losses_of(Path("out"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["run", str(write("scratch")), "output=other", "wandb=project"]) == 2
    assert "pip install wandb" in capsys.readouterr().err and not Path(".other.partial").exists()


def test_a_trace_is_written(write, tmp_path):
    assert main(["run", str(write("scratch")), "steps=3", "data.held_out=[]", "--profile", "trace"]) == 0
    assert list(Path("trace").rglob("*.xplane.pb"))
