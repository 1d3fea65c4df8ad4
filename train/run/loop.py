"""`train(recipe)`: check, read, load, then phase by phase; save.

Going on with an interrupted run means to go through the phases again, each from its newest checkpoint; a phase that was
finished has no steps left.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.errors import UserError
from nemoe_jax.spec import schema
from nemoe_jax.spec.mesh import use_mesh
from nemoe_jax.spec.schema import Tree
from nemoe_jax.utils.distributed import barrier
from train.data.loader import Corpus, open_corpus, source_files
from train.recipe import Phase, Recipe, to_yaml
from train.run.cache_teacher import with_predictions
from train.run.metrics_logger import LOG, TENSORBOARD, MetricsLogger
from train.run.phase import ADAPTERS, PhaseRun
from train.run.prepare import Inputs, load, recipe_mesh, resolve
from train.run.report import write_report
from train.run.results import PhaseResult, RunReport
from train.run.run_directory import Signals, run_directory

REPORT, RECIPE = "report.json", "recipe.yaml"
NO_TARGETS = "no token to be predicted in its rows; longer rows (data.sequence_length) may reach the answers"


def train(recipe: Recipe, restart: bool = False, profile: Path | None = None) -> RunReport:
    """Runs a recipe, or goes on with it.

    Args:
        restart: begin anew, whatever an earlier attempt left.
        profile: directory for a trace of a few steps.

    Returns:
        What report.json holds.

    Raises:
        UserError: what the user can correct, found before any device is touched as far as possible.
        ResumableError: too many steps in a row were not finite.
        Interrupted: SIGTERM or Ctrl-C came; the state is saved.
    """
    # 1. find and check everything; turn the text into rows
    inputs = resolve(recipe)
    corpora = [_corpora(recipe, phase, inputs) for phase in recipe.phases]
    mesh = recipe_mesh(recipe, inputs.config)
    with run_directory(recipe, restart) as directory, Signals() as signals:
        with MetricsLogger(directory, recipe) as logger, use_mesh(mesh):
            # 2. train, each phase on the merged result of the last accepted one
            params = load(recipe, inputs.config, mesh)
            phases: list[PhaseResult] = []
            for number in range(len(recipe.phases)):
                merged = [phase.name for phase in phases if phase.accepted]
                run = PhaseRun(recipe, inputs, number, corpora[number], mesh, directory, logger, merged)
                params, result = run(params, signals, profile)
                phases.append(result)

        # 3. save
        report = _summary(recipe, inputs, phases, logger)
        _save(directory, recipe, inputs, params, report, logger)
    return report


def _corpora(recipe: Recipe, phase: Phase, inputs: Inputs) -> tuple[Corpus, list[Any]]:
    """A phase's rows to train on, and its held-out batches."""
    data, held_out = phase.data, []
    if data.held_out:
        corpus = open_corpus(
            data.held_out, data, inputs.tokenizer, inputs.config.vocab, "data.held_out", (), phase.preference
        )
        held_out = corpus.held_out_batches(data.microbatch_size, phase.eval_batches)
        if not any(batch.mask.any() for batch in held_out):
            raise UserError(f"data.held_out: {NO_TARGETS}")
    exclude = source_files(data.held_out)
    corpus = open_corpus(
        data.train, data, inputs.tokenizer, inputs.config.vocab, "data.train", exclude, phase.preference
    )
    if not any(figures.loss_tokens for figures in corpus.figures):
        raise UserError(f"data.train: {NO_TARGETS}")
    if phase.distill and phase.distill.offline:
        with_predictions(recipe, phase, corpus)
    return corpus, held_out


def _summary(recipe: Recipe, inputs: Inputs, phases: list[PhaseResult], logger: MetricsLogger) -> RunReport:
    last = next((phase for phase in reversed(phases) if phase.accepted), None)
    sizes = [phase.data.batch_size * phase.data.sequence_length * phase.steps for phase in recipe.phases]
    before = phases[0].before
    return RunReport(
        steps=sum(phase.steps for phase in recipe.phases),
        tokens=sum(sizes),
        tokens_per_second=(last or phases[-1]).tokens_per_second,
        params_total=schema.count(inputs.config)[0],
        params_trained=last.params_trained if last else 0,
        phases=phases,
        seconds=round(logger.seconds, 3),
        before=before,
        after=last.after if last else before,
    )


def _save(
    directory: Path, recipe: Recipe, inputs: Inputs, params: Tree, report: RunReport, logger: MetricsLogger
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
        (model / REPORT).write_text(json.dumps(report.as_json(), indent=2) + "\n", "utf-8")
        (model / RECIPE).write_text(to_yaml(recipe), "utf-8")
        write_report(model, report, logger.lines)
        shutil.copyfile(directory / LOG, model / LOG)  # what goes on from here, should this be interrupted, needs it
        for name in (TENSORBOARD, ADAPTERS):
            if (directory / name).exists():
                (directory / name).rename(model / name)
        model.rename(recipe.output)
        shutil.rmtree(directory, ignore_errors=True)  # NFS keeps the lock's file while it is open
    barrier("saved")
