"""Recipes: overrides, validation, errors that a user can mend, and what the command prints about them."""

import re

import pytest
import yaml

from nemoe_jax.errors import UserError
from train.cli import main
from train.recipe import list_keys, read_recipe, shipped_recipes, to_yaml

MINIMAL = {
    "output": "out",
    "model": "in",
    "lora": [{"pattern": "blocks/*"}],
    "steps": 10,
    "data": {"train": "text.txt", "sequence_length": 32, "batch_size": 2},
    "optimizer": {"learning_rate": "1e-3"},
}


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_values_and_defaults(minimal):
    (phase,) = read_recipe(minimal).phases
    assert phase.optimizer.learning_rate == 1e-3  # YAML reads 1e-3 as text
    assert [source.files for source in phase.data.train] == [["text.txt"]]
    assert (phase.trainable, phase.seed, phase.lora[0].rank) == ("lora", 0, 16)


def test_overrides_reach_every_depth(minimal):
    recipe = read_recipe(
        minimal,
        [
            "steps=20",
            "optimizer.learning_rate=2e-4",
            "lora.0.rank=8",
            "distill.teacher=big",
            "distill.kl_weight=0.5",
            "data.train=[a.txt, b.txt]",
            "remat=true",
            "output=2024",
        ],
    )
    (phase,) = recipe.phases
    assert phase.steps == 20 and phase.optimizer.learning_rate == 2e-4 and phase.lora[0].rank == 8
    assert phase.distill.kl_weight == 0.5 and str(phase.distill.teacher) == "big"
    assert [source.files for source in phase.data.train] == [["a.txt"], ["b.txt"]]
    assert recipe.remat is True and str(recipe.output) == "2024"


def test_former_keys_go_on_working_and_say_the_present_one(minimal, capsys):
    note = "data.accumulation: accumulation is now called gradient_accumulation_steps"
    assert read_recipe(minimal, ["data.accumulation=2"]).phases[0].data.microbatch_size == 1
    assert note in capsys.readouterr().err
    minimal.write_text(yaml.safe_dump(MINIMAL | {"phases": [{"data": {"accumulation": 2}}]}))
    assert read_recipe(minimal).phases[0].data.gradient_accumulation_steps == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"note: {minimal}: accumulation is now called gradient_accumulation_steps"


PHASES = [{"name": "a"}, {"name": "b", "steps": 7, "optimizer": {"warmup_steps": 2}, "lora": [{"pattern": "embed"}]}]


def test_phases_take_from_the_top_what_they_do_not_say(minimal):
    minimal.write_text(yaml.safe_dump(MINIMAL | {"phases": PHASES}))
    first, second = read_recipe(minimal).phases
    assert (first.steps, second.steps) == (10, 7)
    assert (first.optimizer.warmup_steps, second.optimizer.warmup_steps) == (0, 2)
    assert first.optimizer.learning_rate == second.optimizer.learning_rate == 1e-3  # mappings are merged
    assert [target.pattern for target in second.lora] == ["embed"]  # lists are not
    assert read_recipe(minimal, ["phases.1.steps=3"]).phases[1].steps == 3
    everywhere = read_recipe(minimal, ["steps=4", "optimizer.warmup_steps=1", "seed=5"])
    assert [(phase.steps, phase.optimizer.warmup_steps, phase.seed) for phase in everywhere.phases] == [(4, 1, 5)] * 2


@pytest.mark.parametrize(
    "phases, override, expected",
    [
        ([{}, {}], "seed=1", r"phases: expected different names, got train, train"),
        (PHASES, "phases.1.stepz=3", r"phases\.1\.stepz: unknown key.*nearest known key is steps"),
        (PHASES, "phases.2.steps=3", r"expected an index below 2, got '2'"),
        (
            PHASES,
            "data.batch_size=0",
            r"[^.]data\.batch_size: expected greater than 0, got 0 \(from the command line\)$",
        ),
        (PHASES, "phases.1.optimizer.warmup_steps=9", r"phases\.1\.optimizer\.warmup_steps: expected at most steps"),
        ([3], "seed=1", r"phases\.0: expected a valid dictionary"),
        ([], "seed=1", r"phases: .*at least 1 item"),
        ("two", "seed=1", r"phases: expected a valid list"),
        (5, "seed=1", r"phases: expected a valid list"),
    ],
)
def test_bad_phases(minimal, phases, override, expected):
    minimal.write_text(yaml.safe_dump(MINIMAL | {"phases": phases}))
    with pytest.raises(UserError) as caught:
        read_recipe(minimal, [override])
    assert re.search(expected, str(caught.value)), caught.value


@pytest.mark.parametrize(
    "override, expected",
    [
        ("stepz=3", r"stepz: unknown key.*nearest known key is steps$"),
        ("optimizer.learning_rte=3", r"optimizer\.learning_rte: unknown key.*optimizer\.learning_rate$"),
        ("learning_rate=3", r"learning_rate: unknown key.*optimizer\.learning_rate$"),
        ("lora.0.rnk=3", r"lora\.0\.rnk: unknown key.*lora\.N\.rank$"),
        ("steps=many", r"steps: expected a valid integer, got 'many' \(from the command line\)"),
        ("steps=0", r"steps: expected .*greater than 0, got 0"),
        (
            "optimizer.schedule=cosin",
            r"optimizer\.schedule: expected 'cosine', 'linear', 'wsd' or 'constant', got 'cosin'",
        ),
        ("optimizer.learning_rate=fast", r"optimizer\.learning_rate: expected a valid number, got 'fast'"),
        ("data.sequence_length=null", r"data\.sequence_length: expected a valid integer, got None"),
        ("data.train=[]", r"data\.train: .*at least 1 item"),
        ("lora.3.rank=8", r"lora\.3\.rank: expected an index below 1, got '3'"),
        ("steps.more=8", r"steps\.more: expected a mapping that holds more, got the value 10"),
        ("steps", r"expected key=value after the recipe, got 'steps'"),
        ("steps=[1", r"steps: not a YAML value"),
        ("scratch.hidden=8", r"scratch.layers: missing; expected number of blocks"),
        ("model=null", r"exactly one of model"),
        ("lora=[]", r"lora: expected at least one"),
        ("trainable=all", r"lora: came with trainable: all"),
        (
            "data.gradient_accumulation_steps=4",
            r"data\.gradient_accumulation_steps: expected a divisor of batch_size 2, got 4",
        ),
        ("data.train={files: a, dataset: b}", r"data\.train\.0: expected exactly one of files and dataset"),
        ("adapter=there", r"adapter: brings its own targets"),
        ("tolerance=0.1", r"tolerance: expected data\.held_out"),
        ("lora.0.dropout=1", r"lora\.0\.dropout: expected less than 1"),
        ("optimizer.warmup_steps=11", r"optimizer\.warmup_steps: expected at most steps \(10\), got 11"),
    ],
)
def test_bad_keys_and_values(minimal, override, expected):
    with pytest.raises(UserError) as caught:
        read_recipe(minimal, [override])
    assert re.search(expected, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_an_error_names_the_file_and_every_bad_key(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"stps": 1, "sed": 2}, sort_keys=False))
    with pytest.raises(UserError, match=r"bad\.yaml: .*stps.*steps.*sed.*seed"):
        read_recipe(path)


def test_an_alias_is_a_copy(minimal):
    shared = "{train: a, sequence_length: 8, batch_size: 2}"
    minimal.write_text(
        f"{minimal.read_text()}phases: [{{name: a, data: &data {shared}}}, {{name: b, data: *data}}]", "utf-8"
    )
    recipe = read_recipe(minimal, ["phases.0.data.batch_size=4"])
    assert [phase.data.batch_size for phase in recipe.phases] == [4, 2]


@pytest.mark.parametrize(
    "text, expected",
    [
        (b"a: [", "not YAML"),
        (b"\xff\x00", "not YAML"),
        (b"steps: 2024-13-45", "not YAML"),
        (b"a: &a [*a]", "not YAML"),
        (b"- a", "expected a mapping"),
        (b"", "output: missing"),
    ],
)
def test_bad_files(tmp_path, text, expected):
    (tmp_path / "bad.yaml").write_bytes(text)
    with pytest.raises(UserError, match=expected):
        read_recipe(tmp_path / "bad.yaml")


def test_a_shape_no_model_can_have(minimal):
    with pytest.raises(UserError, match="kv_heads: expected a divisor of heads"):
        read_recipe(
            minimal,
            [
                "model=null",
                "lora=[]",
                "trainable=all",
                "tokenizer=t",
                "scratch.hidden=8",
                "scratch.layers=1",
                "scratch.heads=3",
                "scratch.kv_heads=2",
                "scratch.head_dim=4",
                "scratch.ffn=8",
            ],
        )


def test_missing_file_names_the_shipped_recipes():
    with pytest.raises(UserError, match=r"nano-dens: no such recipe file.*nano-dense"):
        read_recipe("nano-dens")


def test_shipped_recipes_are_valid_and_found_by_bare_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert {"nano-dense", "nano-repair", "nemoe-12b-16e-repair"} <= set(shipped_recipes())
    for name in shipped_recipes():
        assert read_recipe(name) == read_recipe(f"{name}.yaml")


def test_what_show_prints_is_the_same_recipe(tmp_path, capsys):
    assert main(["show", "nano-repair", "steps=70"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    shown = read_recipe(tmp_path / "shown.yaml")
    assert shown == read_recipe("nano-repair", ["steps=70"]) and to_yaml(shown) == (tmp_path / "shown.yaml").read_text()


def test_every_key_is_described_and_printed(capsys):
    assert main(["keys"]) == 0
    printed = capsys.readouterr().out
    keys = dict(list_keys())
    assert {"steps", "optimizer.learning_rate", "lora.N.rank", "scratch.head_dim", "distill.kl_weight"} <= set(keys)
    for key, field in keys.items():
        assert field.description and f"\n{key}" in f"\n{printed}"


def test_recipes_lists_each_with_its_first_line(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    assert all(len(line.split()) > 4 for line in lines)


def test_bad_recipe_is_one_line_and_status_2(minimal, capsys):
    assert main(["run", str(minimal), "stepz=3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
