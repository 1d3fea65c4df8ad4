"""Training end to end on tiny models: what learns, what must not, what is written and what is left behind."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from nemoe_jax import checkpoint, hf, schema
from nemoe_jax.config import ModelConfig
from nemoe_jax.schema import leaves
from nemoe_jax.tokenizer import load_tokenizer
from nemoe_jax.transformer import forward
from train import loop
from train.cli import main
from train.journal import Journal
from train.loop import train
from train.optimizer import learning_rate_schedule, make_optimizer
from train.prepare import check, load
from train.recipe import Recipe, read_recipe
from train.step import Objective, combine, initial_state, make_update, split

CONTROL = 20
SHAPE = {"hidden": 24, "layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 10, "context": 64}
DENSE = ModelConfig(family="mistral", vocab=CONTROL + 256, ffn=40, dtype="float32", **SHAPE)
MIXTURE = DENSE.replace(family="mixtral", ffn=0, experts=4, top_k=2, expert_ffn=12)
TEXT = [f"{number} and {number} are {2 * number}; all sums are even.\n" * 3 for number in range(30)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A byte-level tokenizer, a dense and a carved-like model, and text."""
    place = tmp_path_factory.mktemp("workplace")
    names = ["<unk>", "<s>", "</s>"] + [f"<SPECIAL_{number}>" for number in range(3, CONTROL)]
    vocab = [{"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode()} for byte in range(256)]
    config = {
        "pattern": r"[^\s]+|\s+",
        "num_vocab_tokens": 256,
        "default_vocab_size": CONTROL + 256,
        "default_num_special_tokens": CONTROL,
        "version": "v3",
    }
    special = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)]
    (place / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": special}))
    for name, model in (("dense", DENSE), ("mixture", MIXTURE), ("other", DENSE.replace(vocab=300))):
        params = random_params(model)
        if model.experts:  # as small as carving leaves it
            params["blocks"]["moe"]["ffn"]["router"] *= 1e-3
        hf.save(place / name, model, params)
        (place / name / "tekken.json").write_bytes((place / "tekken.json").read_bytes())
    (place / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT[3:]))
    (place / "held_out.txt").write_text("".join(TEXT[:3]))
    return place


def random_params(config: ModelConfig, seed: int = 0):
    """Parameters from NumPy's generator, which has nothing to compile."""
    rng = np.random.default_rng(seed)

    def make(spec):
        return np.ones(spec.shape, "f4") if spec.std is None else np.float32(rng.normal(size=spec.shape) * spec.std)

    return jax.tree.map(make, schema.declare(config))


@pytest.fixture
def write(workplace, tmp_path, monkeypatch):
    """Writes a recipe over the workplace and returns its path; the run's own paths are under tmp_path."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, **keys) -> Path:
        recipe = {
            "output": str(tmp_path / "out"),
            "steps": 8,
            "eval_batches": 2,
            "data": {
                "train": str(workplace / "train.jsonl"),
                "held_out": str(workplace / "held_out.txt"),
                "sequence_length": 32,
                "batch_size": 4,
            },
            "optimizer": {"learning_rate": "1e-2", "warmup_steps": 2, "schedule": "linear"},
        }
        if name == "scratch":
            recipe |= {"trainable": "all", "scratch": SHAPE | {"ffn": 40}, "tokenizer": str(workplace / "tekken.json")}
        else:
            recipe |= {
                "model": str(workplace / "mixture"),
                "train_router": True,
                "lora": [{"pattern": "blocks/*/attn/*", "rank": 3}, {"pattern": "blocks/moe/ffn/[gud]*", "rank": 2}],
                "distill": {"teacher": str(workplace / "dense")},
            }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe | keys))
        return tmp_path / f"{name}.yaml"

    return write


def log_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]


def losses_of(output: Path) -> list[float]:
    return [line["loss"] for line in log_of(output) if "loss" in line]


def ready(recipe: Recipe):
    """(objective, state, frozen, optimizer, update) of a recipe, without the loop."""
    inputs = check(recipe)
    trainable, frozen = load(recipe, inputs, None)
    objective = Objective(recipe, inputs.config, inputs.teacher_config, inputs.tokenizer.eos_id)
    optimizer = make_optimizer(recipe.optimizer, recipe.steps, loop._router_scale(recipe, trainable, frozen))
    state = initial_state(trainable, optimizer)
    update = make_update(objective, optimizer, learning_rate_schedule(recipe.optimizer, recipe.steps), state)
    return objective, state, frozen, update


def tokens_of(rows: int = 4) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(CONTROL, CONTROL + 256, (rows, 33)), jnp.int32)


def test_scratch_run_learns_and_its_output_is_a_model(write, workplace, capsys):
    assert main(["run", str(write("scratch")), "steps=30", "eval_every=20", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    output = Path("out")
    assert json.loads((output / "report.json").read_text()) == figures
    assert figures["held_out_loss_before"] == pytest.approx(np.log(276), abs=1)
    assert figures["held_out_loss_after"] < 3.5
    assert figures["params_trained"] == figures["params_total"] == schema.count(DENSE)[0]
    assert figures["tokens"] == 30 * 4 * 32 and figures["tokens_per_second"] > 0

    log = log_of(output)
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 31))
    assert [line["step"] for line in log if "held_out_loss" in line] == [0, 20, 30]
    assert log[-1]["held_out_loss"] == figures["held_out_loss_after"]
    assert [line["learning_rate"] for line in log if "loss" in line][:3] == pytest.approx([5e-3, 1e-2, 1e-2])

    config, params = hf.load(output)
    assert config == DENSE.replace(bos_token_id=1, eos_token_id=2)
    assert held_out_loss(config, params, workplace) == pytest.approx(figures["held_out_loss_after"], abs=1e-5)
    assert load_tokenizer(output).encode("ab") == [CONTROL + 97, CONTROL + 98]
    assert read_recipe(output / "recipe.yaml").steps == 30
    assert sorted(path.name for path in Path().iterdir()) == ["out", "scratch.yaml"]


def held_out_loss(config, params, workplace) -> float:
    """Mean −log p over the windows that evaluation takes, in NumPy."""
    tokenizer = load_tokenizer(workplace)
    stream = np.array(tokenizer.encode((workplace / "held_out.txt").read_text(), eos=True))
    windows = min(8, (len(stream) - 1) // 32)
    starts = np.linspace(0, len(stream) - 33, windows).astype(int)
    rows = np.stack([stream[start : start + 33] for start in starts])
    logits = np.asarray(forward(config, params, jnp.asarray(rows[:, :-1])).logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, rows[:, 1:, None], -1).mean()


def test_lora_repair_learns_and_merges(write, workplace):
    before = {path.name: path.read_bytes() for path in (workplace / "mixture").iterdir()}
    figures = train(read_recipe(write("repair"), ["steps=25"]))
    lines = [line for line in log_of(Path("out")) if "loss" in line]
    assert lines[-1]["kl"] < 0.7 * lines[0]["kl"]
    assert lines[0]["loss"] == pytest.approx(lines[0]["kl"]) and lines[0]["balance_loss"] >= 0.99
    assert figures["params_trained"] < 0.5 * figures["params_total"]
    assert np.shape(figures["expert_load"]) == (2, 4) and np.sum(figures["expert_load"]) == pytest.approx(2, abs=1e-4)

    config, params = hf.load("out")
    assert config == MIXTURE
    assert held_out_loss(config, params, workplace) == pytest.approx(figures["held_out_loss_after"], abs=1e-4)
    base, changed = leaves(hf.load(workplace / "mixture")[1]), leaves(params)
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
        state, figures = update(state, frozen, None, tokens_of())
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


def test_without_train_router_only_adapters_learn(write):
    _, state, frozen, _ = ready(read_recipe(write("repair", train_router=False)))
    assert state.trainable["params"] == {} and "blocks/moe/ffn/router" in frozen


def test_split_and_combine_are_inverse():
    params = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), random_params(MIXTURE))
    trained, frozen = split(params, lambda path: path.endswith("router"))
    assert trained["blocks/moe/ffn/router"].dtype == jnp.float32 and frozen["embed"].dtype == jnp.bfloat16
    for path, array in leaves(combine(trained, frozen)).items():
        np.testing.assert_array_equal(np.asarray(array, np.float32), np.asarray(leaves(params)[path], np.float32))


def test_the_loss_is_the_weighted_sum_and_zero_against_itself(write, workplace):
    recipe = read_recipe(
        write("repair"),
        ["distill.kl_weight=0.7", "distill.ce_weight=0.2", "balance_loss_weight=0.3", "z_loss_weight=0.01"],
    )
    objective, state, frozen, _ = ready(recipe)
    teacher = hf.load(workplace / "dense")[1]
    total, parts = jax.jit(objective.loss)(state.trainable, frozen, teacher, tokens_of())
    wanted = 0.7 * parts["kl"] + 0.2 * parts["cross_entropy"] + 0.3 * parts["balance_loss"] + 0.01 * parts["z_loss"]
    assert total == pytest.approx(float(wanted), rel=1e-6) and parts["kl"] > 0.1

    itself = read_recipe(write("repair"), [f"distill.teacher={workplace / 'mixture'}"])
    objective, state, frozen, _ = ready(itself)
    total, _ = jax.jit(objective.loss)(state.trainable, frozen, hf.load(workplace / "mixture")[1], tokens_of())
    assert abs(float(total)) < 1e-6


def test_separate_documents_do_not_see_each_other(write):
    recipe = read_recipe(write("scratch"), ["data.separate_documents=true"])
    objective, state, frozen, _ = ready(recipe)
    row = np.array(tokens_of(1)[0])
    row[12] = row[25] = 2  # EOS: documents of 13, 13 and 7 tokens
    held_out = jax.jit(objective.held_out)
    packed = held_out(state.trainable, frozen, jnp.asarray(row[None]), jnp.ones(1))
    alone = [
        held_out(state.trainable, frozen, jnp.asarray(part[None]), jnp.ones(1))
        for part in (row[:13], row[13:26], row[26:])
    ]
    assert packed["tokens"] == sum(part["tokens"] for part in alone) == 30
    assert packed["loss"] == pytest.approx(float(sum(part["loss"] for part in alone)), rel=1e-5)


def test_rows_of_weight_zero_do_not_count(write):
    objective, state, frozen, _ = ready(read_recipe(write("repair")))
    tokens = tokens_of(4)
    held_out = jax.jit(objective.held_out)
    whole = held_out(state.trainable, frozen, tokens, jnp.array([1.0, 1, 0, 0]))
    half = held_out(state.trainable, frozen, tokens[:2], jnp.ones(2))
    assert whole["tokens"] == 64 and whole["loss"] == pytest.approx(float(half["loss"]), rel=1e-5)


def test_the_seed_decides_everything(write):
    recipe = write("scratch")
    runs = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert main(["run", str(recipe), "steps=4", f"seed={seed}", f"output={name}", "save_dtype=bfloat16"]) == 0
        runs[name] = losses_of(Path(name))
        assert checkpoint.read_config(name).dtype == "bfloat16"
    assert runs["a"] == runs["b"] and runs["a"] != runs["c"]


def test_master_weights_are_float32_and_saved_in_save_dtype(write):
    recipe = read_recipe(write("scratch"), ["dtype=bfloat16", "steps=3", "remat=true"])
    _, state, frozen, _ = ready(recipe)
    assert {array.dtype for array in jax.tree.leaves(state.trainable)} == {np.dtype("float32")} and not frozen
    train(recipe)
    assert checkpoint.read_config("out").dtype == "bfloat16" == hf.load("out")[1]["embed"].dtype


@pytest.mark.parametrize(
    "overrides, wanted",
    [
        (["output=."], "output: . already exists"),
        (["model=missing"], "missing: no such"),
        (["distill.teacher=missing"], "missing: no such"),
        (["data.train=missing.txt"], "missing.txt: no text there"),
        (["data.train=empty.txt"], "empty.txt: empty text"),
        (["data.sequence_length=65"], "data.sequence_length: wanted at most the model's context of 64 tokens, got 65"),
        (["lora.0.pattern=blocks/*/attention"], "LoRA target blocks/*/attention matches no weight"),
        (["mesh=fsdp=3,rows=2"], "unknown axis 'rows'"),
        (["mesh=fsdp=3"], "wants 3 devices"),
        (["distill.teacher=OTHER"], "other: wanted the model's vocabulary of 276, got 300"),
        (["model=OTHER", "train_router=false"], "distill.teacher: "),
        (["model=OTHER", "train_router=true", "lora=[{pattern: blocks/*}]"], "vocabulary of 300"),
        (["stepz=3"], "nearest known key is steps"),
    ],
)
def test_bad_input_is_one_line_status_2_and_leaves_nothing(write, workplace, tmp_path, capsys, overrides, wanted):
    recipe = write("repair", output="new/deep/out")
    (tmp_path / "empty.txt").write_text("\n")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    overrides = [override.replace("OTHER", str(workplace / "other")) for override in overrides]
    assert main(["run", str(recipe), *overrides]) == 2
    captured = capsys.readouterr()
    assert wanted in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == before and captured.out == ""


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, 130), (OSError, None)])
def test_an_interrupted_run_leaves_nothing(write, tmp_path, monkeypatch, capsys, error, status):
    def stop(self, done, figures):
        if done == 3:
            raise error

    monkeypatch.setattr(Journal, "step", stop)
    arguments = ["run", str(write("scratch", output="new/out"))]
    if status is None:
        with pytest.raises(error):
            main(arguments)
    else:
        assert main(arguments) == status
    assert [path.name for path in tmp_path.iterdir()] == ["scratch.yaml"]


def test_on_a_mesh_the_losses_are_the_same(write):
    recipe = write("repair", steps=3, distill=None, lora=[{"pattern": "blocks/moe/*/[qd]*", "rank": 4}])
    assert main(["run", str(recipe), "output=one"]) == 0
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(Path(loop.__file__).parents[1]),
    }
    command = [sys.executable, "-m", "train.cli", "run", str(recipe), "output=four", "mesh=fsdp=2,expert=2"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    np.testing.assert_allclose(losses_of(Path("four")), losses_of(Path("one")), rtol=1e-5)
    assert json.loads(Path("four/report.json").read_text())["held_out_loss_after"] == pytest.approx(
        json.loads(Path("one/report.json").read_text())["held_out_loss_after"], rel=1e-5
    )
