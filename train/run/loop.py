"""`train(recipe)`: check, read, load, then phase by phase; save.

Going on with an interrupted run means to go through the phases again, each from its newest checkpoint; a phase that was
finished has no steps left.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.errors import UserError
from nemoe_jax.spec import schema
from nemoe_jax.spec.schema import Tree
from nemoe_jax.utils.distributed import barrier
from train.data.loader import Batch, Corpus, open_corpus, source_files
from train.recipe import Phase, Recipe, to_yaml
from train.run.journal import LOG, TENSORBOARD, MetricsLogger
from train.run.phase import ADAPTERS, PhaseRun
from train.run.prepare import Inputs, load, recipe_mesh, resolve
from train.run.report import write_report
from train.run.run_directory import Signals, run_directory

REPORT, RECIPE = "report.json", "recipe.yaml"
NO_TARGETS = "no token to be predicted in its rows; longer rows (data.sequence_length) may reach the answers"


def train(recipe: Recipe, restart: bool = False, profile: Path | None = None) -> dict[str, Any]:
    """Runs a recipe, or goes on with it, and returns what report.json holds.

    Args:
        restart: begin anew, whatever an earlier attempt left.
        profile: directory for a trace of a few steps.

    Raises:
        UserError: what the user can mend, found before any device is touched as far as possible.
        ResumableError: too many steps in a row were not finite.
        Interrupted: SIGTERM or Ctrl-C came; the state is saved.
    """
    # 1. find and check everything; turn the text into rows
    inputs = resolve(recipe)
    corpora = [_corpora(phase, inputs) for phase in recipe.phases]
    mesh = recipe_mesh(recipe, inputs.config)
    with run_directory(recipe, restart) as directory, Signals() as signals:
        with MetricsLogger(directory, recipe) as journal, jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            # 2. train, each phase on the merged result of the last accepted one
            params = load(recipe, inputs.config, mesh)
            phases: list[dict[str, Any]] = []
            for number in range(len(recipe.phases)):
                merged = [phase["name"] for phase in phases if phase["accepted"]]
                run = PhaseRun(recipe, inputs, number, corpora[number], mesh, directory, journal, merged)
                params, figures = run(params, signals, profile)
                phases.append(figures)

        # 3. save
        report = _summary(recipe, inputs, phases, journal)
        _save(directory, recipe, inputs, params, report, journal)
    return report


def _corpora(phase: Phase, inputs: Inputs) -> tuple[Corpus, list[Batch]]:
    """A phase's rows to train on, and its held-out batches."""
    data, held_out = phase.data, []
    if data.held_out:
        corpus = open_corpus(data.held_out, data, inputs.tokenizer, inputs.config.vocab, "data.held_out")
        held_out = corpus.held_out_batches(data.batch_size // data.accumulation, phase.eval_batches)
        if not any(batch.mask.any() for batch in held_out):
            raise UserError(f"data.held_out: {NO_TARGETS}")
    exclude = source_files(data.held_out)
    corpus = open_corpus(data.train, data, inputs.tokenizer, inputs.config.vocab, exclude=exclude)
    if not any(figures.loss_tokens for figures in corpus.figures):
        raise UserError(f"data.train: {NO_TARGETS}")
    return corpus, held_out


def _summary(recipe: Recipe, inputs: Inputs, phases: list[dict[str, Any]], journal: MetricsLogger) -> dict[str, Any]:
    """The report: the run, and each phase; the last accepted phase's held-out figures stand at the top as well.

    Where every phase was discarded, the model is what it was, and so is its loss.
    """
    unchanged = {"tokens_per_second": phases[-1]["tokens_per_second"], "params_trained": 0}
    if "held_out_loss_before" in phases[0]:
        unchanged["held_out_loss_after"] = phases[0]["held_out_loss_before"]
    last = next((phase for phase in reversed(phases) if phase["accepted"]), unchanged)
    sizes = [phase.data.batch_size * phase.data.sequence_length * phase.steps for phase in recipe.phases]
    first = {name: phases[0][name] for name in ("held_out_loss_before",) if name in phases[0]}
    shown = ("held_out_loss_after", "perplexity", "load_max_over_mean", "expert_load", "params_trained")
    return {
        "steps": sum(phase.steps for phase in recipe.phases),
        "tokens": sum(sizes),
        "tokens_per_second": last["tokens_per_second"],
        "params_total": schema.count(inputs.config)[0],
        **first,
        **{name: last[name] for name in shown if name in last},
        "phases": phases,
        "seconds": round(journal.seconds, 3),
    }


def _save(
    directory: Path, recipe: Recipe, inputs: Inputs, params: Tree, report: dict[str, Any], journal: MetricsLogger
) -> None:
    """The model, merged, in the recipe's dtype, with tokenizer, log, adapters and report, under the output's name."""
    source, model = inputs.tokenizer_path, directory / "model"
    if jax.process_index() == 0:
        shutil.rmtree(model, ignore_errors=True)
    barrier("save")
    pretrained.save_pretrained(
        model,
        inputs.config,
        params,
        dtype=recipe.save_dtype or recipe.dtype,
        tokenizer_from=source if source.is_dir() else None,
    )
    if jax.process_index() == 0:
        if not source.is_dir():  # under the name by which a model directory's tokenizer is found
            names = {
                "tekken": "tekken.json",
                "sentencepiece": "tokenizer" + "".join(source.name.partition(".model")[1:]),
            }
            shutil.copyfile(source, model / names.get(inputs.tokenizer.kind, "tokenizer.json"))
        (model / REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        (model / RECIPE).write_text(to_yaml(recipe), "utf-8")
        write_report(model, report, journal.lines)
        shutil.copyfile(directory / LOG, model / LOG)  # what goes on from here, should this be interrupted, needs it
        for name in (TENSORBOARD, ADAPTERS):
            if (directory / name).exists():
                (directory / name).rename(model / name)
        model.rename(recipe.output)
        shutil.rmtree(directory, ignore_errors=True)  # NFS keeps the lock's file while it is open
    barrier("saved")
