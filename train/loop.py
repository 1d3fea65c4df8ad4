"""`train(recipe)`: check, read, load, step, log, evaluate, save."""

import contextlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemoe_jax import hf, lora, schema, sharding
from nemoe_jax.schema import Tree
from nemoe_jax.text import spaced_batches, tokenize
from train.data import TrainingBatches
from train.journal import Journal
from train.optimizer import learning_rate_schedule, make_optimizer, router_scale
from train.prepare import Inputs, check, load
from train.recipe import Recipe, to_yaml
from train.step import Flat, Objective, combine, initial_state, load_max_over_mean, make_update

Sums = dict[str, jax.Array]


def train(recipe: Recipe) -> dict[str, Any]:
    """Runs a recipe and returns what report.json holds; the output directory appears only when all is done.

    Raises:
        UserError: what the user can mend, found before any device is touched as far as possible.
    """
    started = time.monotonic()
    data, options = recipe.data, recipe.optimizer

    # 1. find and check everything; turn the text into batches
    inputs = check(recipe)
    stream = tokenize(inputs.train_files, inputs.tokenizer, "tokenise train")
    batches = TrainingBatches(stream, data.sequence_length, data.batch_size, recipe.seed)
    held_out = _held_out(recipe, inputs)

    # 2. lay the model, and its teacher, out on the devices
    mesh = sharding.make_mesh(inputs.mesh_sizes) if inputs.mesh_sizes else None
    with _staging(recipe.output) as staging, jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        trainable, frozen = load(recipe, inputs, mesh)
        teacher = None
        if recipe.distill:
            teacher = hf.load(recipe.distill.teacher, mesh=mesh, dtype=recipe.dtype, progress=True)[1]
        params_trained = sum(array.size for array in jax.tree.leaves(trainable))

        # 3. compile the update and the evaluation
        objective = Objective(recipe, inputs.config, inputs.teacher_config, inputs.tokenizer.eos_id)
        optimizer = make_optimizer(options, recipe.steps, _router_scale(recipe, trainable, frozen))
        state = initial_state(trainable, optimizer)
        update = make_update(objective, optimizer, learning_rate_schedule(options, recipe.steps), state)
        evaluate = _evaluator(objective, held_out, mesh)

        # 4. step, log, evaluate
        evaluations: list[dict[str, Any]] = []
        step_tokens = data.batch_size * data.sequence_length
        with Journal(staging / "train_log.jsonl", recipe.steps, step_tokens, recipe.log_every) as journal:
            for done in range(recipe.steps + 1):
                if done:
                    state, figures = update(state, frozen, teacher, _place(batches.batch(done - 1), mesh))
                    journal.step(done, figures)
                if done in (0, recipe.steps) or (recipe.eval_every and done % recipe.eval_every == 0):
                    journal.flush()
                    if held_out:
                        evaluations.append(evaluate(state.trainable, frozen))
                        journal.evaluated(done, evaluations[-1])
                    if done:  # the first step compiles and is not timed
                        journal.resume()

        # 5. save
        report = {
            "steps": recipe.steps,
            "tokens": recipe.steps * step_tokens,
            "tokens_per_second": round(journal.tokens_per_second, 1),
            "params_total": schema.count(inputs.config)[0],
            "params_trained": params_trained,
            **_summary(evaluations),
        }
        _save(staging / "model", recipe, inputs, state.trainable, frozen)
        report["seconds"] = round(time.monotonic() - started, 3)
        (staging / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        (staging / "recipe.yaml").write_text(to_yaml(recipe), "utf-8")
        for name in ("train_log.jsonl", "report.json", "recipe.yaml"):
            (staging / name).rename(staging / "model" / name)
        (staging / "model").rename(recipe.output)
    return report


@contextlib.contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A directory beside the output, on the same file system, that is gone at the end whatever happens."""
    missing = [parent for parent in output.absolute().parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: the output is there, or another run's
            for parent in missing:
                parent.rmdir()


def _held_out(recipe: Recipe, inputs: Inputs) -> list[tuple[np.ndarray, np.ndarray]]:
    if not inputs.held_out_files:
        return []
    stream = tokenize(inputs.held_out_files, inputs.tokenizer, "tokenise held-out")
    data = recipe.data
    return spaced_batches(stream, data.sequence_length, data.batch_size, recipe.eval_batches, "data.held_out")


def _router_scale(recipe: Recipe, trainable: Tree, frozen: Flat) -> jax.Array | None:
    """The learning-rate factor of each layer's router; a model has at most one run of mixtures."""
    for path, router_LDE in (frozen | trainable["params"]).items():
        if path.endswith("/router"):
            return router_scale(router_LDE, recipe.optimizer.router_learning_rate_scale)
    return None


def _place(rows: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """Rows of a batch on the devices that compute them."""
    if mesh is None:
        return jax.device_put(rows)
    axes = sharding.batch_axes(mesh.shape, len(rows))
    return jax.device_put(rows, NamedSharding(mesh, PartitionSpec(axes or None)))


def _evaluator(
    objective: Objective, held_out: list[tuple[np.ndarray, np.ndarray]], mesh: Mesh | None
) -> Callable[[Tree, Flat], dict[str, Any]]:
    """(trainable, frozen) → loss, perplexity and the experts' load on the held-out text."""
    batch_sums = jax.jit(objective.held_out)

    def evaluate(trainable: Tree, frozen: Flat) -> dict[str, Any]:
        sums = [batch_sums(trainable, frozen, *(_place(part, mesh) for part in batch)) for batch in held_out]
        total: Sums = jax.tree.map(lambda *terms: sum(np.asarray(term, np.float64) for term in terms), *sums)
        loss = float(total["loss"] / total["tokens"])
        result: dict[str, Any] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if "load" in total:
            load_LE = total["load"] / total["tokens"]
            result["load_max_over_mean"] = float(load_max_over_mean(load_LE))
            result["expert_load"] = load_LE.round(6).tolist()
        return result

    return evaluate


def _summary(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The report's part about the held-out text: losses before and after, and the rest as it is at the end."""
    if not evaluations:
        return {}
    first, last = evaluations[0], evaluations[-1]
    return {"held_out_loss_before": first["loss"], "held_out_loss_after": last["loss"]} | {
        name: value for name, value in last.items() if name != "loss"
    }


def _save(directory: Path, recipe: Recipe, inputs: Inputs, trainable: Tree, frozen: Flat) -> None:
    """The model with its adapters merged, in the recipe's dtype, with its tokenizer."""
    params = lora.merge(inputs.config, combine(trainable["params"], frozen), trainable["adapters"])
    source = inputs.tokenizer_path
    hf.save(
        directory,
        inputs.config,
        params,
        dtype=recipe.save_dtype or recipe.dtype,
        tokenizer_from=source if source.is_dir() else None,
    )
    if not source.is_dir():  # under the name by which a model directory's tokenizer is found
        names = {"tekken": "tekken.json", "sentencepiece": "tokenizer" + "".join(source.name.partition(".model")[1:])}
        shutil.copyfile(source, directory / names.get(inputs.tokenizer.kind, "tokenizer.json"))
