"""One phase of a run: from the parameters before it to those after it.

L layers, E experts.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from nemoe_jax.adapters import lora, peft_load
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.errors import ResumableError
from nemoe_jax.spec import schema
from nemoe_jax.spec.schema import Tree
from train.data.loader import Batch, Corpus
from train.recipe import Recipe
from train.run.checkpoint import Checkpoints
from train.run.journal import MetricsLogger
from train.run.prepare import Inputs, routers_scale, trainable_of
from train.run.run_directory import Interrupted, Signals
from train.step import model_flops
from train.step.batch_sharding import local_rows, place_whole, shard_batch
from train.step.optimizer import learning_rate_schedule, make_optimizer
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
        corpora: tuple[Corpus, list[Batch]],
        mesh: Mesh | None,
        directory: Path,
        journal: MetricsLogger,
        merged: list[str],
    ):
        """`merged`: the phases before that were accepted."""
        self.recipe, self.phase, self.config = recipe, recipe.phases[number], inputs.config
        self.targets, self.teacher_config = inputs.targets[number], inputs.teachers[number]
        self.corpus, self.held_out = corpora
        self.mesh, self.journal, self.merged = mesh, journal, merged
        self.label = f"{number + 1}-{self.phase.name}"
        self.checkpoints = directory / "checkpoints" / self.label
        self.adapters = directory / ADAPTERS
        self.offset = sum(phase.steps for phase in recipe.phases[:number])

    def __call__(self, params: Tree, signals: Signals, profile: Path | None) -> tuple[Tree, dict[str, Any]]:
        """(the parameters after the phase, or those before it where it was discarded; figures)."""
        phase = self.phase
        optimizer = make_optimizer(phase.optimizer, phase.steps, routers_scale(phase, params, self.mesh))
        trainable, frozen = trainable_of(self.recipe, phase, self.config, self.targets, params, self.mesh)
        rows = local_rows(phase.data, self.mesh)
        iterator = self.corpus.iterator(phase.data.batch_size, phase.seed, rows)
        with Checkpoints(self.checkpoints, self.recipe.checkpoints) as checkpoints:
            if restored := checkpoints.restore(state_shape(trainable, optimizer)):
                state, iterator_state = restored
                iterator.set_state(iterator_state)
                for array in jax.tree.leaves(trainable):
                    array.delete()  # as the first update would: of weights that are all trained there is one copy
            else:
                state = initial_state(trainable, optimizer, phase.seed)
            tokens = phase.data.batch_size * phase.data.sequence_length
            self.journal.begin(phase.name, int(state.step), self.offset, tokens, self._seconds_per_token())
            if state.step < phase.steps:
                batches = (shard_batch(batch, rows, phase.data, self.mesh) for batch in iterator)
                state = self._steps(
                    state, frozen, optimizer, batches, iterator.get_state, checkpoints, signals, profile
                )
        return self._judge(state.trainable, frozen, params)

    def _steps(
        self,
        state: TrainState,
        frozen: Flat,
        optimizer: optax.GradientTransformation,
        batches: Iterator[Batch],
        iterator_state: Callable[[], Any],
        checkpoints: Checkpoints,
        signals: Signals,
        profile: Path | None,
    ) -> TrainState:
        """Takes the steps that are left; evaluates, logs and saves on the way."""
        phase, journal = self.phase, self.journal
        objective = Objective(self.recipe, phase, self.config, self.teacher_config)
        teacher = None
        if phase.distill:
            teacher = pretrained.load_pretrained(
                phase.distill.teacher, mesh=self.mesh, dtype=self.recipe.dtype, progress=True
            )[1]
        update = make_update(objective, optimizer, learning_rate_schedule(phase.optimizer, phase.steps), state)
        evaluate = self._evaluator(objective)
        done = first = int(state.step)
        if not done and self.held_out:
            journal.evaluated(0, evaluate(state.trainable, frozen))
        while done < phase.steps:
            batch = next(batches)
            with jax.profiler.trace(profile) if profile and done == first + 1 else contextlib.nullcontext():
                state, figures = update(state, frozen, teacher, batch)
                if profile:
                    jax.block_until_ready(figures)
            done += 1
            journal.step(done, figures)
            stop, last = signals.received(self.offset + done), done == phase.steps
            evaluates = self.held_out and (last or (phase.eval_every and done % phase.eval_every == 0))
            saves = last or stop or done % checkpoints.every == 0
            if evaluates or saves or done == first + 1:  # the first step compiles and is not timed
                journal.flush()
                if evaluates:
                    journal.evaluated(done, evaluate(state.trainable, frozen))
                if last or stop or (saves and not journal.skipped_in_row):
                    loss = journal.evaluations(phase.name).get(done, {}).get("loss")
                    checkpoints.save(state, iterator_state(), loss, wait=bool(stop))
                journal.resume()
            if stop:
                raise Interrupted(stop, f"{phase.name}: saved after step {done}; the same command goes on")
            if journal.skipped_in_row > self.recipe.max_skipped:
                raise ResumableError(self._given_up(checkpoints.latest))
        return state

    def _judge(self, trainable: Tree, frozen: Flat, before: Tree) -> tuple[Tree, dict[str, Any]]:
        """Takes or discards the phase's result, and keeps its adapter either way."""
        phase, evaluations = self.phase, self.journal.evaluations(self.phase.name)
        first, last = evaluations.get(0, {}), evaluations.get(phase.steps, {})
        accepted = phase.tolerance is None or last["loss"] <= first["loss"] + phase.tolerance
        lines = [line for line in self.journal.lines if line["phase"] == phase.name]
        figures = {
            "name": phase.name,
            "accepted": accepted,
            "steps": phase.steps,
            "skipped": sum(line.get("skipped", False) for line in lines),
            "params_trained": sum(array.size for array in jax.tree.leaves(trainable)),
            "tokens_per_second": max((line.get("tokens_per_second", 0.0) for line in lines[-2:]), default=0.0),
            "data": [figures._asdict() for figures in self.corpus.figures],
        }
        if last:
            figures |= {"held_out_loss_before": first["loss"], "held_out_loss_after": last["loss"]}
            figures |= {name: value for name, value in last.items() if name != "loss"}
        if phase.trainable != "all":
            name = self.label if accepted else f"{self.label}.discarded"
            self._save_adapters(self.adapters / name, trainable, before)
            figures["adapter"] = f"{ADAPTERS}/{name}"
        if not accepted:
            kept = f"; its adapter is kept in {figures['adapter']}" if "adapter" in figures else ""
            self.journal.say(
                f"{phase.name}: discarded: held-out loss {first['loss']:.4f} -> {last['loss']:.4f}, tolerance "
                f"{phase.tolerance}{kept}"
            )
            return before, figures
        return lora.merge(self.config, combine(trainable["params"], frozen), trainable["adapters"]), figures

    def _save_adapters(self, directory: Path, trainable: Tree, before: Tree) -> None:
        if not directory.exists():
            flat = schema.leaves(before)
            changes = {path: array - flat[path] for path, array in trainable["params"].items()}
            base = str((self.recipe.model or self.recipe.output).absolute())
            if self.merged:  # a model that is on no disk: PEFT is not to take another for it
                base += f" after {', '.join(self.merged)}"
            peft_load.save_adapters(directory, self.config, trainable["adapters"], base_model=base, changes=changes)

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

    def _evaluator(self, objective: Objective) -> Callable[[Tree, Flat], dict[str, Any]]:
        """(trainable, frozen) → loss, perplexity and the experts' load on the held-out text."""
        batch_sums = jax.jit(objective.held_out)

        def evaluate(trainable: Tree, frozen: Flat) -> dict[str, Any]:
            sums = []
            for batch in self.held_out:
                on_devices = place_whole(batch, self.mesh)
                sums.append(jax.device_get(batch_sums(trainable, frozen, on_devices)))
            total = jax.tree.map(lambda *terms: sum(np.asarray(term, np.float64) for term in terms), *sums)
            loss = float(total["loss"] / total["tokens"])
            result: dict[str, Any] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
            if "load" in total:
                load_LE = total["load"] / total["tokens"]
                result["load_max_over_mean"] = float(load_max_over_mean(load_LE))
                result["expert_load"] = load_LE.round(6).tolist()
            return result

        return evaluate
