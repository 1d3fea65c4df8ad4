"""One phase of a run: from the parameters before it to those after it.

L layers, E experts.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from nemoe_jax.adapters import lora, peft_save
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.errors import ResumableError
from nemoe_jax.spec import schema
from nemoe_jax.spec.schema import Tree
from train.data.loader import Batch, Corpus
from train.data.packing import shortened
from train.recipe import Recipe
from train.run.checkpoint import Checkpoints
from train.run.metrics_logger import MetricsLogger
from train.run.prepare import Inputs, bias_shape, router_ties, routers_scale, trainable_of
from train.run.reference import with_reference
from train.run.results import HeldOut, PhaseResult
from train.run.run_directory import Interrupted, Signals
from train.run.teacher import share_weights
from train.step import model_flops
from train.step.batch_sharding import local_rows, place_whole, shard_batch
from train.step.choose_experts import choose_experts
from train.step.chosen_experts import Places
from train.step.optimizer import learning_rate_schedule, make_optimizer
from train.step.preference import PreferenceObjective, make_objective
from train.step.step import (
    Flat,
    Objective,
    TrainState,
    combine,
    initial_state,
    load_max_over_mean,
    make_update,
    state_shape,
)

ADAPTERS = "adapters"


class PhaseRun:
    """One phase: from the parameters before it to those after it."""

    def __init__(
        self,
        recipe: Recipe,
        inputs: Inputs,
        number: int,
        corpora: tuple[Corpus, list[Any]],
        mesh: Mesh | None,
        directory: Path,
        logger: MetricsLogger,
        merged: list[str],
    ):
        """`merged`: the phases before that were accepted."""
        self.recipe, self.phase, self.config = recipe, recipe.phases[number], inputs.config
        self.targets, self.teacher_config = inputs.targets[number], inputs.teachers[number]
        self.corpus, self.held_out = corpora
        self.mesh, self.logger, self.merged = mesh, logger, merged
        self.label = f"{number + 1}-{self.phase.name}"
        self.checkpoints = directory / "checkpoints" / self.label
        self.adapters = directory / ADAPTERS
        self.offset = sum(phase.steps for phase in recipe.phases[:number])

    def __call__(self, params: Tree, signals: Signals, profile: Path | None) -> tuple[Tree, PhaseResult]:
        """The parameters after the phase (those before it where it was discarded), and what it came to."""
        phase = self.phase
        self.ties = router_ties(phase, self.config, params, self.mesh)
        scale = routers_scale(phase, params, self.mesh)
        optimizer = make_optimizer(phase.optimizer, phase.steps, scale, self.config, self.ties)
        objective = make_objective(self.recipe, phase, self.config, self.teacher_config)
        objective = dataclasses.replace(objective, whole_groups=self.ties is not None)
        places: Places = ()
        if phase.trainable == "esft":
            table = self.adapters / self.label / "experts.json"
            places = choose_experts(objective, params, self.corpus, self.mesh, table)
            self.logger.say(f"{phase.name}: {len(places)} experts of all layers learn")
        trainable, frozen = trainable_of(self.recipe, phase, self.config, self.targets, params, self.mesh, places)
        if isinstance(objective, PreferenceObjective) and phase.preference and phase.preference.has_reference:
            self.held_out = with_reference(objective, trainable, frozen, self.corpus, self.held_out, self.mesh)
        rows = local_rows(phase.data, self.mesh)
        bias = bias_shape(phase, self.config)
        iterator = self.corpus.iterator(phase.data.batch_size, phase.seed, rows)
        with Checkpoints(self.checkpoints, self.recipe.checkpoints) as checkpoints:
            if restored := checkpoints.restore(state_shape(trainable, optimizer, bias)):
                state, iterator_state = restored
                iterator.set_state(iterator_state)
                for array in jax.tree.leaves(trainable):
                    array.delete()  # as the first update would: of weights that are all trained there is one copy
            else:
                state = initial_state(trainable, optimizer, phase.seed, bias)
            tokens = phase.data.batch_size * phase.data.sequence_length
            self.logger.begin(phase.name, int(state.step), self.offset, tokens, self._seconds_per_token())
            if state.step < phase.steps:
                batches = self._batches(iterator, int(state.step), rows)
                state = self._steps(
                    state, frozen, objective, optimizer, batches, iterator.get_state, checkpoints, signals, profile
                )
            chosen = phase.steps
            if phase.select == "best":
                state, chosen = self._best(state, checkpoints)
        return self._judge(state.trainable, frozen, params, chosen)

    def _batches(self, iterator: Iterator[Batch], step: int, rows: list[int]) -> Iterator[Batch]:
        """The batches of a step and those after it, on the devices."""
        data = self.phase.data
        for number, batch in enumerate(iterator, step):
            length = data.length_at(number)
            batch = shortened(batch, length) if length < data.sequence_length else batch
            yield shard_batch(batch, rows, data, self.mesh)

    def _best(self, state: TrainState, checkpoints: Checkpoints) -> tuple[TrainState, int]:
        """(the state of the lowest held-out loss, its step); the last one where that checkpoint could not be kept."""
        checkpoints.wait()
        evaluations = self.logger.evaluations(self.phase.name)
        kept = [step for step in checkpoints.steps if step in evaluations and math.isfinite(evaluations[step].loss)]
        best = min(kept, key=lambda step: evaluations[step].loss, default=self.phase.steps)
        if best == self.phase.steps or (restored := checkpoints.restore(state, best)) is None:
            return state, self.phase.steps
        self.logger.say(f"{self.phase.name}: takes step {best}, of the lowest held-out loss")
        return restored[0], best

    def _steps(
        self,
        state: TrainState,
        frozen: Flat,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        batches: Iterator[Batch],
        iterator_state: Callable[[], Any],
        checkpoints: Checkpoints,
        signals: Signals,
        profile: Path | None,
    ) -> TrainState:
        """Takes the steps that are left; evaluates, logs and saves on the way."""
        phase, logger = self.phase, self.logger
        teacher = None
        if phase.distill and not phase.distill.offline:
            teacher = pretrained.load_pretrained(
                phase.distill.teacher, mesh=self.mesh, dtype=self.recipe.dtype, progress=True
            )[1]
            teacher, saved = share_weights(teacher, frozen)
            if saved:
                logger.say(f"{phase.name}: {saved / 1e6:,.1f} MB of the teacher's weights are the student's, held once")
        schedule = learning_rate_schedule(phase.optimizer, phase.steps)
        update = make_update(objective, optimizer, schedule, state, self.ties)
        evaluate = self._evaluator(objective)
        done = first = int(state.step)
        if not done and self.held_out:
            logger.evaluated(0, evaluate(state.trainable, frozen))
        while done < phase.steps:
            batch = next(batches)
            with jax.profiler.trace(profile) if profile and done == first + 1 else contextlib.nullcontext():
                state, figures = update(state, frozen, teacher, batch)
                if profile:
                    jax.block_until_ready(figures)
            done += 1
            logger.step(done, figures)
            stop, last = signals.received(self.offset + done), done == phase.steps
            evaluates = self.held_out and (last or (phase.eval_every and done % phase.eval_every == 0))
            saves = last or stop or done % checkpoints.every == 0 or (evaluates and phase.select == "best")
            if evaluates or saves or done == first + 1:  # the first step compiles and is not timed
                logger.flush()
                if evaluates:
                    logger.evaluated(done, evaluate(state.trainable, frozen))
                if last or stop or (saves and not logger.skipped_in_row):
                    measured = logger.evaluations(phase.name).get(done)
                    checkpoints.save(state, iterator_state(), measured.loss if measured else None, wait=bool(stop))
                logger.resume()
            if stop:
                raise Interrupted(stop, f"{phase.name}: saved after step {done}; the same command goes on")
            if logger.skipped_in_row > self.recipe.max_skipped:
                raise ResumableError(self._given_up(checkpoints.latest))
        return state

    def _judge(self, trainable: Tree, frozen: Flat, before: Tree, chosen: int) -> tuple[Tree, PhaseResult]:
        """Takes or discards the phase's parameters by its acceptance test, and keeps its adapter either way."""
        phase, evaluations = self.phase, self.logger.evaluations(self.phase.name)
        first, last = evaluations.get(0), evaluations.get(chosen)
        rise = last.loss - first.loss if first and last else 0.0
        accepted = phase.tolerance is None or rise <= phase.tolerance
        name = self.label if accepted else f"{self.label}.discarded"
        keeps_adapter = phase.trainable in ("lora", "router")
        if keeps_adapter:
            self._save_adapters(self.adapters / name, trainable, before)
        lines = [line for line in self.logger.lines if line["phase"] == phase.name]
        result = PhaseResult(
            name=phase.name,
            accepted=accepted,
            steps=phase.steps,
            skipped=sum(line.get("skipped", False) for line in lines),
            params_trained=sum(array.size for array in jax.tree.leaves(trainable)),
            tokens_per_second=max(
                (line["tokens_per_second"] for line in lines[-2:] if "tokens_per_second" in line), default=None
            ),
            data=self.corpus.figures,
            before=first if last else None,
            after=last,
            adapter=f"{ADAPTERS}/{name}" if keeps_adapter else None,
            chosen_step=chosen,
        )
        if accepted:
            merged = lora.merge(self.config, combine(trainable["params"], frozen), trainable["adapters"])
            return (self.ties.tied(merged) if self.ties else merged), result
        assert first and last  # tolerance needs data.held_out
        kept = f"; its adapter is kept in {result.adapter}" if result.adapter else ""
        self.logger.say(
            f"{phase.name}: discarded: held-out loss {first.loss:.4f} -> {last.loss:.4f}, tolerance "
            f"{phase.tolerance}{kept}"
        )
        return before, result

    def _save_adapters(self, directory: Path, trainable: Tree, before: Tree) -> None:
        if not directory.exists():
            flat = schema.leaves(before)
            changes = {path: array - flat[path] for path, array in trainable["params"].items()}
            base = str((self.recipe.model or self.recipe.output).absolute())
            if self.merged:  # a model that is on no disk: PEFT is not to take another for it
                base += f" after {', '.join(self.merged)}"
            peft_save.save_adapters(directory, self.config, trainable["adapters"], base_model=base, changes=changes)

    def _seconds_per_token(self) -> float | None:
        """Seconds that the devices need for a token at their peak; None where no peak is known."""
        devices = jax.devices() if self.mesh else jax.devices()[:1]
        peak = model_flops.peak_flops(devices[0].device_kind)
        if peak is None:
            return None
        per_token = model_flops.of_phase(self.phase, self.config, self.targets, self.teacher_config)
        return per_token / (peak * len(devices))

    def _given_up(self, latest: int | None) -> str:
        kept = f"the last good checkpoint is {self.checkpoints / str(latest)}" if latest else "there is no checkpoint"
        return (
            f"{self.phase.name}: more than {self.recipe.max_skipped} steps in a row had a loss or gradient that is not "
            f"finite; {kept}; a lower optimizer.learning_rate may help (with --restart)"
        )

    def _evaluator(self, objective: Objective) -> Callable[[Tree, Flat], HeldOut]:
        """(trainable, frozen) → loss, perplexity and the experts' load on the held-out text."""
        batch_sums = jax.jit(objective.held_out)

        def evaluate(trainable: Tree, frozen: Flat) -> HeldOut:
            sums = []
            for batch in self.held_out:
                on_devices = place_whole(batch, self.mesh)
                sums.append(jax.device_get(batch_sums(trainable, frozen, on_devices)))
            total = jax.tree.map(lambda *terms: sum(np.asarray(term, np.float64) for term in terms), *sums)
            means = {name: value / total["weight"] for name, value in total.items()}
            loss, accuracy, load_LE = float(means["loss"]), means.get("accuracy"), means.get("load")
            return HeldOut(
                loss,
                perplexity=math.exp(min(loss, 700.0)) if accuracy is None else None,
                load_max_over_mean=None if load_LE is None else float(load_max_over_mean(load_LE)),
                expert_load=None if load_LE is None else load_LE.round(6).tolist(),
                accuracy=None if accuracy is None else float(accuracy),
            )

        return evaluate
