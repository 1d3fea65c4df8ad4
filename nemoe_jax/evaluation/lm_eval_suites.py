"""Runs benchmarks of the lm-evaluation-harness one by one, keeps each one's results, and compares them.

The suite is that of the announcement of Mistral NeMo (Mistral AI, 18 July 2024), with its numbers of shots and its
results. The announcement does not say which metric of a task it means; `Benchmark.metric` is what is usually quoted.
"""

import contextlib
import hashlib
import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from nemoe_jax.errors import UserError, listed
from nemoe_jax.utils.output_path import atomic_write

RATES = ("acc", "exact_match", "em", "f1")  # what metrics from 0 to 1 are called
TASK_SUFFIXES = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
BOOTSTRAPS = 1000  # resamplings for the standard error of a metric that has no formula


class Benchmark(NamedTuple):
    """A task of the harness."""

    task: str
    shots: int | None = None  # None: as the task says
    metric: str | None = None  # the harness's name of it, with its filter; None: all that the task has
    published: float | None = None  # per cent, of Mistral NeMo Base


class Settings(NamedTuple):
    """What results depend on besides the task and the weights; a file holds those of one setting alone."""

    model: str
    limit: float | None = None  # questions of a task: a number, or below 1 a share
    chat_template: bool = False
    dtype: str | None = None
    kv_cache: str | None = None


SUITES = {
    "nemo": (
        Benchmark("hellaswag", 0, "acc_norm,none", 83.5),
        Benchmark("winogrande", 0, "acc,none", 76.8),
        Benchmark("nq_open", 5, "exact_match,remove_whitespace", 31.2),
        Benchmark("triviaqa", 5, "exact_match,remove_whitespace", 73.8),
        Benchmark("mmlu", 5, "acc,none", 68.0),
        Benchmark("openbookqa", 0, "acc_norm,none", 60.6),
        Benchmark("commonsense_qa", 0, "acc,none", 70.4),
        Benchmark("truthfulqa_mc2", 0, "acc,none", 50.3),
    )
}


def prepare_harness() -> None:
    """What the harness needs before its first import.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise UserError("the lm-evaluation-harness is not installed: pip install 'nemoe-jax[eval]'")
    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would fork a process in which JAX has threads
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def run(
    load: Callable[[], Any],
    benchmarks: Sequence[Benchmark],
    settings: Settings,
    output: Path | None = None,
    include_path: str | None = None,
    weights: str = "",
) -> tuple[dict[str, Any], list[str]]:
    """The document of all results, as `output` keeps it after each task, and what kept tasks from running.

    Args:
        load: gives the harness's model; called when there is something to run.
        output: results that it has already are not computed again, unless they are those of other weights or tasks.
        include_path: a directory with more tasks.
        weights: the model's fingerprint.

    Raises:
        UserError: an unknown task, or an output file of other settings.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.tasks import TaskManager

    document = read_results(output, settings, benchmarks)
    problems: list[str] = []
    key = {"weights": weights, "task_files": hash_of_files(include_path)}
    held = document["tasks"]
    stale = [name for name, results in held.items() if any(results.get(part) != key[part] for part in key)]
    named = [one.task for one in benchmarks if one.task in held]
    report_reuse(output, [name for name in named if name not in stale], [name for name in named if name in stale])
    for name in stale:
        del held[name]
    left = [one for one in benchmarks if one.task not in held]
    if not left:
        return document, problems
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include-path {include_path}: no such directory")
    manager = TaskManager(include_path=include_path)
    for one in left:
        if one.task not in manager.all_tasks and not Path(one.task).is_file():
            near = get_close_matches(one.task, manager.all_tasks, 3)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"{one.task}: the harness has no task of that name{meant}")
    model = None
    for one in left:
        random.seed(DEFAULT_RANDOM_SEED)  # some tasks shuffle what they load; the seeds are the harness's own
        np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002
        try:
            loaded = manager.load([one.task])
        except Exception as error:  # a task is a program: it may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            problems.append(f"{one.task}: its data cannot be loaded ({reason:.200})")
            continue
        model = model or load()
        try:
            held[one.task] = run_task(model, one, loaded, settings) | key
        except UserError as error:
            problems.append(f"{one.task}: {error}")
            continue
        if output is not None:
            write_results(output, document)
    return document, problems


def hash_of_files(directory: str | None) -> str:
    """SHA-256 of the names and contents of the files of own tasks: what their results depend on."""
    if directory is None:
        return ""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(directory).rglob("*") if path.suffix in TASK_SUFFIXES):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def report_reuse(output: Path | None, reused: Sequence[str], stale: Sequence[str]) -> None:
    """Says on standard error which kept results are reported, and which are not."""
    if reused:
        print(f"{output}: reused the results of {', '.join(reused)}", file=sys.stderr)
    if stale:
        why = "the model or the task files have changed since"
        print(f"{output}: {', '.join(stale)} runs again: {why}", file=sys.stderr)


def run_task(model: Any, benchmark: Benchmark, loaded: Any, settings: Settings) -> dict[str, Any]:
    """The harness's results of one loaded task, or of all of a group's."""
    import lm_eval
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    started = time.monotonic()
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (benchmark.shots is not None and own != 0):  # a task's own 0 means that it has no examples
            task.set_config(key="num_fewshot", value=benchmark.shots or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints; standard output is for the report
        result = lm_eval.evaluate(
            model,
            loaded,
            limit=settings.limit,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    assert result is not None  # it is for the other processes of a job alone
    return {
        "wanted_shots": benchmark.shots,
        "shots": sorted(set(result["n-shot"].values())),
        "questions": sum(counts["effective"] for counts in result["n-samples"].values()),
        "seconds": time.monotonic() - started,
        "results": {
            name: {key: value for key, value in of.items() if isinstance(value, int | float)}
            for name, of in result["results"].items()
        },
    }


def read_results(output: Path | None, settings: Settings, benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """What an output file holds, or a document without tasks.

    Raises:
        UserError: no such document, or one of other settings.
    """
    from lm_eval import __version__

    document: dict[str, Any] = {"harness": __version__, **settings._asdict(), "tasks": {}}
    if output is None or not output.exists():
        if output is not None and not output.parent.is_dir():
            raise UserError(f"{output}: no directory {output.parent}")
        return document
    wanted = {key: value for key, value in document.items() if key != "tasks"}
    try:
        held = json.loads(output.read_bytes())
        found = {key: held.get(key) if key == "kv_cache" else held[key] for key in wanted}
        for one in benchmarks:
            if one.task in held["tasks"]:
                wanted[f"shots of {one.task}"] = one.shots
                found[f"shots of {one.task}"] = held["tasks"][one.task]["wanted_shots"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{output}: not the results of nemoe eval ({error!r})") from error
    wrong = [f"{key}: expected {wanted[key]}, it has {found[key]}" for key in wanted if wanted[key] != found[key]]
    if wrong:
        raise UserError(f"{output} holds results of other settings ({listed(wrong)}); give another --output")
    return document | {"tasks": held["tasks"]}


def write_results(output: Path, document: dict[str, Any]) -> None:
    """The document, whole or not at all."""
    with atomic_write(output) as partial:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def compare(document: dict[str, Any], benchmarks: Sequence[Benchmark]) -> list[dict[str, Any]]:
    """A row for each metric of each finished task, beside the published figure where there is one.

    `RATES` are per cent, other metrics as the harness gives them. Where a task lacks the metric that was published, its
    others are shown, without comparison.
    """
    rows = []
    for one in benchmarks:
        held = document["tasks"].get(one.task)
        if held is None:
            continue
        parts = held["results"]
        compared = one.metric in parts.get(one.task, {})
        for name in [one.task] if one.task in parts else parts:
            for key, value in parts[name].items():
                metric, _, chosen = key.partition(",")
                if not chosen or metric.endswith("_stderr") or (compared and key != one.metric):
                    continue
                scale = 100 if metric.startswith(RATES) else 1
                error = parts[name].get(f"{metric}_stderr,{chosen}")
                row = {"task": name, "shots": held["shots"], "metric": metric, "filter": chosen}
                row |= {"score": scale * value, "standard_error": None if error is None else scale * error}
                if compared and one.published is not None:
                    row |= {"published": one.published, "difference": scale * value - one.published}
                rows.append(row)
    return rows


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """The rows as a table on standard output."""
    compared = any("published" in row for row in rows)
    table = Table(box=None, pad_edge=False)
    for title in ("task", "shots", "metric"):
        table.add_column(title)
    for title in ("score", "± std. error", *(("published", "difference") if compared else ())):
        table.add_column(title, justify="right")
    for row in rows:
        error = row["standard_error"]
        cells = [row["task"], ", ".join(map(str, row["shots"])), row["metric"]]
        cells += [f"{row['score']:.2f}", "" if error is None else f"{error:.2f}"]
        if compared:
            cells += [f"{row['published']:.1f}", f"{row['difference']:+.2f}"] if "published" in row else ["", ""]
        table.add_row(*cells)
    Console().print(table)
