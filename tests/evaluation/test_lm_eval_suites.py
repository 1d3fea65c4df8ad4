"""`nemoe eval`: the suite, the report beside published results, and that finished tasks are not run again."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

os.environ["HF_DATASETS_OFFLINE"] = "1"  # read at import
os.environ["TQDM_DISABLE"] = "1"

import pytest
import yaml

pytest.importorskip("lm_eval")

import lm_eval.tasks

from nemoe_jax.cli import main
from nemoe_jax.evaluation import lm_eval_model, lm_eval_suites
from nemoe_jax.evaluation.lm_eval_suites import SUITES, Benchmark, compare
from tests.evaluation.test_lm_eval_model import write_model, write_tasks

HARNESS_TASKS = Path(lm_eval.tasks.__file__).parent
NOWHERE = "{task: nowhere, dataset_path: nobody/nothing, output_type: multiple_choice, test_split: test}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory of a model and of task files."""
    place = tmp_path_factory.mktemp("eval")
    write_model(place / "model")
    write_tasks(place)
    (place / "nowhere.yaml").write_text(NOWHERE)
    answers = (place / "answers.yaml").read_text()
    (place / "long.yaml").write_text(answers.replace(", max_gen_toks: 12", "").replace("our_answers", "long"))
    return place


@pytest.fixture(autouse=True)
def only_our_tasks(monkeypatch, tmp_path_factory):
    """The harness's own task files take seconds to read."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def run(capsys, place, *flags):
    """(exit status, standard output, standard error)"""
    status = main.main(["eval", str(place / "model"), "--include-path", str(place), *map(str, flags)])
    return status, *capsys.readouterr()


def test_the_suite_is_of_tasks_that_the_harness_has():
    class Loader(yaml.SafeLoader):
        """Reads task files without the functions that they name."""

    Loader.add_constructor("!function", lambda loader, node: node.value)
    specs = {}
    for folder in ("hellaswag", "winogrande", "nq_open", "triviaqa", "mmlu/default", "openbookqa", "commonsense_qa"):
        for file in (HARNESS_TASKS / folder).glob("*.yaml"):
            spec = yaml.load(file.read_text(), Loader)
            specs[spec.get("group", spec.get("task"))] = spec
    spec = yaml.load((HARNESS_TASKS / "truthfulqa/truthfulqa_mc2.yaml").read_text(), Loader)
    specs[spec["task"]] = spec
    for task, shots, metric, published in SUITES["nemo"]:
        metrics = specs[task].get("metric_list") or specs[task]["aggregate_metric_list"]
        filters = [one["name"] for one in specs[task].get("filter_list", [{"name": "none"}])]
        assert metric in [f"{one['metric']},{name}" for one in metrics for name in filters]
        assert shots in (0, 5) and 25 < published < 90


def test_results_are_kept_and_compared_and_not_computed_again(place, capsys, tmp_path, monkeypatch):
    benchmarks = (Benchmark("our_choices", 1, "acc_norm,none", 50.0), Benchmark("nowhere", 0, "acc,none", 60.0))
    monkeypatch.setitem(SUITES, "nemo", benchmarks)
    output = tmp_path / "results.json"
    status, out, error = run(capsys, place, "--suite", "nemo", "--limit", "6", "--output", output, "--json")
    assert status == 2
    assert error.splitlines()[-1].startswith("error: nowhere: its data cannot be loaded")
    (row,) = json.loads(out)["comparison"]
    kept = json.loads(output.read_text())["tasks"]["our_choices"]
    assert (kept["questions"], kept["shots"]) == (6, [1])
    assert row["task"] == "our_choices" and row["metric"] == "acc_norm"
    assert row["score"] == pytest.approx(100 * kept["results"]["our_choices"]["acc_norm,none"])
    assert row["difference"] == pytest.approx(row["score"] - 50)
    assert row["standard_error"] == pytest.approx(100 * kept["results"]["our_choices"]["acc_norm_stderr,none"])
    assert not list(tmp_path.glob("*.partial"))

    monkeypatch.setattr(lm_eval_model, "NemoeLM", None)  # nothing is left to run it for
    monkeypatch.setitem(SUITES, "nemo", benchmarks[:1])
    status, out, _ = run(capsys, place, "--suite", "nemo", "--limit", "6", "--output", output)
    assert status == 0
    title, line = (text.split() for text in out.splitlines())
    assert title[-2:] == ["published", "difference"]
    figures = [f"{row['score']:.2f}", f"{row['standard_error']:.2f}", "50.0", f"{row['score'] - 50:+.2f}"]
    assert line == ["our_choices", "1", "acc_norm", *figures]
    status, _, error = run(capsys, place, "--suite", "nemo", "--limit", "7", "--output", output)
    assert status == 2 and f"{output} holds results of other settings (limit: expected 7, it has 6)" in error


def test_results_of_other_weights_or_tasks_are_not_reported(place, capsys, tmp_path):
    """What the file holds is reused for the same model and tasks alone, and what happens is said."""
    model, tasks, output = tmp_path / "model", tmp_path / "tasks", tmp_path / "results.json"
    shutil.copytree(place / "model", model)
    tasks.mkdir()
    for name in ("choices.yaml", "data.jsonl"):
        shutil.copy(place / name, tasks)

    def evaluated(expected, said):
        flags = ["--include-path", str(tasks), "--tasks", "our_choices", "--limit", "4", "--output", str(output)]
        assert main.main(["eval", str(model), *flags]) == 0
        assert said in capsys.readouterr().err
        kept = json.loads(output.read_text())["tasks"]["our_choices"]
        assert (kept["seconds"] == before) == expected
        return kept["seconds"]

    before = None
    before = evaluated(False, "")
    evaluated(True, f"{output}: reused the results of our_choices")
    again = f"{output}: our_choices runs again: the model or the task files have changed since"
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    before = evaluated(False, again)
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    before = evaluated(False, again)
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')  # other ends of generated text
    before = evaluated(False, again)
    (tasks / "choices.yaml").write_text((tasks / "choices.yaml").read_text() + "# changed\n")
    before = evaluated(False, again)
    evaluated(True, "reused")


def test_several_tasks_show_all_of_their_metrics(place, capsys):
    flags = ("--tasks", "our_choices,our_texts", "--num-fewshot", "0", "--limit", "0.5")
    status, out, _ = run(capsys, place, *flags)
    assert status == 0
    lines = [line.split()[:3] for line in out.splitlines()[1:]]
    assert [line for line in lines if line[0] == "our_choices"] == [
        ["our_choices", "0", m] for m in ("acc", "acc_norm")
    ]
    assert {line[2] for line in lines if line[0] == "our_texts"} == {"word_perplexity", "bits_per_byte"}
    assert "published" not in out


def test_a_group_is_one_row_weighted_by_its_parts(place, capsys, tmp_path):
    for answer, name in enumerate(("one", "two")):
        text = (place / "choices.yaml").read_text().replace("our_choices", f"part_{name}")
        (tmp_path / f"{name}.yaml").write_text(text.replace("doc_to_target: answer", f"doc_to_target: {answer}"))
    group = "{group: whole, task: [part_one, part_two], aggregate_metric_list: [{metric: acc, weight_by_size: true}]}"
    (tmp_path / "group.yaml").write_text(group)
    status, out, _ = run(capsys, place, "--include-path", tmp_path, "--tasks", "whole", "--limit", "5", "--json")
    assert status == 0
    document = json.loads(out)
    held = document["tasks"]["whole"]
    (row,) = document["comparison"]
    parts = [held["results"][name]["acc,none"] for name in ("part_one", "part_two")]
    assert row["task"] == "whole" and row["score"] == pytest.approx(100 * sum(parts) / 2)
    assert (held["questions"], held["shots"]) == (10, [2])


def test_a_metric_that_is_gone_is_not_compared():
    results = {"old": {"acc,none": 0.25, "acc_stderr,none": 0.01, "sample_len": 3}}
    held = {"shots": [0], "results": results}
    (row,) = compare({"tasks": {"old": held}}, [Benchmark("old", 0, "acc_norm,none", 80.0)])
    assert row["score"] == 25 and row["standard_error"] == 1 and "published" not in row


ERRORS = {
    "unknown task": (
        ["--tasks", "our_choice"],
        "our_choice: the harness has no task of that name; did you mean our_choices",
    ),
    "no such directory": (["--tasks", "x", "--include-path", "/no/such"], "--include-path /no/such: no such directory"),
    "shots of a suite": (["--suite", "nemo", "--num-fewshot", "2"], "--num-fewshot: a suite has its own"),
    "negative shots": (["--tasks", "our_choices", "--num-fewshot", "-1"], "--num-fewshot: expected 0 or more, got -1"),
    "limit": (["--tasks", "our_choices", "--limit", "1.5"], "--limit: expected a whole number of questions"),
    "batch size": (["--tasks", "our_choices", "--batch-size", "0"], "--batch-size: expected a positive number, got 0"),
    "not results": (["--tasks", "our_choices", "--output", "{place}/data.jsonl"], "not the results of nemoe eval"),
    "cache": (["--tasks", "our_choices", "--kv-cache", "int3"], "cache dtype: expected one of float32"),
    "output nowhere": (["--tasks", "our_choices", "--output", "/no/such/file.json"], "no directory /no/such"),
    "no data": (["--tasks", "nowhere"], "nowhere: its data cannot be loaded"),
    "too many new tokens": (["--tasks", "long"], "max_gen_toks: expected 1 to 95, less than the context, got 256"),
}


@pytest.mark.parametrize("flags, message", ERRORS.values(), ids=ERRORS.keys())
def test_errors_are_one_line(place, capsys, flags, message):
    status, _, error = run(capsys, place, *(flag.format(place=place) for flag in flags))
    assert status == 2
    last = error.splitlines()[-1]  # behind the harness's progress
    assert last.startswith("error: ") and error.count("error: ") == 1 and message in last


def test_a_missing_harness_is_one_line(place, capsys, monkeypatch):
    monkeypatch.setattr(lm_eval_suites, "find_spec", lambda name: None)
    status, _, error = run(capsys, place, "--tasks", "our_choices")
    assert status == 2 and "pip install 'nemoe-jax[eval]'" in error


def test_help_does_not_import_the_harness():
    program = """
import sys
import nemoe_jax.cli.main
try:
    nemoe_jax.cli.main.main(["--help"])
finally:
    assert "lm_eval" not in sys.modules and "jax" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0
