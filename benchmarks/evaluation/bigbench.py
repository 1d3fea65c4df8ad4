"""Benchmarks that people know, without a hub: tasks of the bigbench source archive, run by `nemoe eval`.

    python -m benchmarks.evaluation.bigbench runs/demo/dense runs/demo/control runs/demo/calibrated runs/demo/repaired

The archive (bigbench 1.0.0, 340 MB, from the package index) holds TruthfulQA's multiple choice, Social IQa, StrategyQA,
WinoWhy and BIG-bench's general knowledge as JSON. They become tasks of the lm-evaluation-harness with BIG-bench's own
prompts: a choice is scored by its log-likelihood (acc), or by that per character (acc_norm). Its WinoGrande names the
right word without the wrong one and is left out; HumanEval and GSM8K it does not have.

Named peer: the score of always taking a choice at random.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.lib.results import add_keep, keep, machine

ARCHIVE = "bigbench==1.0.0"
FOLDER = "bigbench-1.0.0/bigbench/benchmark_tasks"
TASKS = {
    "truthful_qa_mc": "truthful_qa/task_mc.json",
    "social_iqa": "social_iqa/task.json",
    "strategyqa": "strategyqa/task.json",
    "winowhy": "winowhy/task.json",
    "general_knowledge": "general_knowledge/task.json",
}
TASK = """\
task: bigbench_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def main() -> None:
    """Fetches and converts the tasks, scores each model, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="model directories")
    parser.add_argument("--output", type=Path, default=Path("runs/bigbench"), help="tasks and scores are kept here")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="the .tar.gz, instead of fetching it")
    parser.add_argument("--limit", default="200", help="questions of each task (default 200; the first ones)")
    add_keep(parser)
    arguments = parser.parse_args()
    tasks = arguments.output / "tasks"
    if not tasks.exists():
        write_tasks(arguments.archive, tasks)
    scores: dict[str, dict[str, float]] = {"chance": {name: chance(tasks, name, arguments.limit) for name in TASKS}}
    for model in arguments.models:
        results = arguments.output / f"{model.name}.json"
        names = [f"bigbench_{name}" for name in TASKS]
        flags = ["--include-path", tasks, "--limit", arguments.limit, "--output", results]
        command = [sys.executable, "-m", "nemoe_jax.cli.main", "eval", model, "--tasks", *names, *flags]
        subprocess.run([str(part) for part in command], check=True)
        found = json.loads(results.read_text(encoding="utf-8"))["tasks"]
        scores[model.name] = {name: score(found[f"bigbench_{name}"]["results"][f"bigbench_{name}"]) for name in TASKS}
    print(f"\n{'accuracy, per cent':24}" + "".join(f"{name:>20}" for name in TASKS))
    for name, row in scores.items():
        print(f"{name:24}" + "".join(f"{100 * row[task]:>20.1f}" for task in TASKS))
    if arguments.keep:
        keep("bigbench", machine() | {"limit": arguments.limit, "accuracy": scores})


def write_tasks(archive: Path | None, directory: Path) -> None:
    """A YAML file and a JSONL file for each task."""
    with tempfile.TemporaryDirectory() as scratch:
        if archive is None:
            fetch = ["pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", scratch, ARCHIVE]
            if subprocess.run([sys.executable, "-m", *fetch], check=False).returncode:
                sys.exit(f"{ARCHIVE} cannot be fetched; give its source archive to --archive")
            (archive,) = Path(scratch).glob("*.tar.gz")
        wanted, found = {f"{FOLDER}/{path}": name for name, path in TASKS.items()}, {}
        with tarfile.open(archive) as files:
            for member in files:
                if member.name in wanted and (file := files.extractfile(member)):
                    found[wanted[member.name]] = json.load(file)
    if missing := [path for path, name in wanted.items() if name not in found]:
        sys.exit(f"{archive}: expected {', '.join(missing)}")
    directory.mkdir(parents=True)
    for name, task in found.items():
        data = directory.resolve() / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in questions(task)), encoding="utf-8")
        (directory / f"{name}.yaml").write_text(TASK.format(name=name, data=data), encoding="utf-8")


def questions(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Question, choices and the index of the best one, as BIG-bench asks them without examples."""
    rows = []
    for example in task["examples"]:
        choices = list(example["target_scores"])
        text = task.get("task_prefix", "") + task.get("example_input_prefix", "\nQ: ") + example["input"]
        if task.get("append_choices_to_input", True):
            text += "".join(f"\n  choice: {choice}" for choice in choices)
        best = max(range(len(choices)), key=lambda number: example["target_scores"][choices[number]])
        text += task.get("example_output_prefix", "\nA: ")
        rows.append({"question": text.strip(), "choices": choices, "answer": best})
    return rows


def chance(tasks: Path, name: str, limit: str) -> float:
    """The accuracy of choosing at random."""
    rows = [json.loads(line) for line in (tasks / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = rows[: int(limit)]
    return sum(1 / len(row["choices"]) for row in rows) / len(rows)


def score(result: dict[str, Any]) -> float:
    """The accuracy by log-likelihood."""
    return float(next(value for name, value in result.items() if name.split(",")[0] == "acc"))


if __name__ == "__main__":
    main()
