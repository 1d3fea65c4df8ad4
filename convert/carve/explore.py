"""`carve --explore`: what each way to carve costs and saves, tried on a few layers, before a model is made.

Each point is a carve (or its control) of a few layers, one at a time, in the dense model: the layer is carved on the
calibration text, and the held-out part goes through it and through the dense layers after it. The loss that this adds,
times the number of layers, is the estimate of the whole: layers are carved on what carved layers before them give, so
that the real figure differs; it ranks the points. Tokens per second are those of a model of two such layers with
random weights, decoding one sequence, for all layers of the source without embedding and head.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.carve.calibration import CalibrationStreams
from convert.carve.layer import carve_layer
from convert.carve.shape import carved_config, with_refit_steps
from convert.manifest import Manifest
from convert.options import CarveOptions
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.inference.generate import generate
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import count, initialize
from nemoe_jax.utils.output_path import atomic_write
from nemoe_jax.utils.progress import progress_bar

REPORT, PLOT = "explore.json", "explore.png"
TIMED_LAYERS, TIMED_TOKENS, TIMED_VOCABULARY = 2, 64, 256
COLUMNS = ("loss_above_dense", "kl_divergence", "active", "parameters", "tokens_per_second")


@dataclasses.dataclass
class Branch:
    """The held-out text behind one carved layer of a point."""

    point: int
    layer: int
    streams: list[jax.Array]


def points(experts: int, ffn: int) -> Iterator[dict[str, Any]]:
    """The options of each point: active shares with their controls, overlap, finer experts, a shared expert."""
    for top_k in dict.fromkeys(max(experts * part // 4, 1) for part in (1, 2, 3)):
        yield {"top_k": top_k, "control": True}
        yield {"top_k": top_k}
    few = max(experts // 4, 1)
    yield {"experts": 2 * experts, "top_k": few, "overlap": 2}
    yield {"experts": 4 * experts, "top_k": 4 * few, "partition": "token-clusters"}
    yield {"experts": 4 * experts, "top_k": 4 * few, "partition": "gate-kmeans", "refit_steps": 0}
    if not experts % 8:  # an eighth of the neurons always, as many of the others
        yield {"layout": "shared", "shared_ffn": ffn // 8, "experts": experts * 7 // 4, "top_k": experts // 4}


def explore(source: str | Path, destination: str | Path, options: CarveOptions, layers: int) -> Manifest:
    """Tries the points on some layers; writes and returns the report.

    Args:
        destination: a directory to make, for the report and its plot.
        options: of which text, seed and refit hold for all points, and `experts` is where they start.
        layers: how many to try, evenly spaced.

    Raises:
        UserError: no calibration text, no dense model, or too few layers.
    """
    checkpoint = Checkpoint(source)
    dense = checkpoint.config
    if not options.calibration:
        raise UserError("--explore: expected --calibration text")
    if not 1 <= layers <= dense.layers:
        raise UserError(f"--explore-layers: expected 1 to {dense.layers} of {source}, got {layers}")
    plain = dataclasses.replace(options, explore=False, control=False, overlap=1, layout="mixtral", partition="auto")
    tried: list[dict[str, Any]] = []
    shapes: list[tuple[CarveOptions, ModelConfig] | None] = []
    for change in points(options.experts, dense.ffn):
        changed = dataclasses.replace(plain, **change)
        row: dict[str, Any] = {"command": _command(source, changed)}
        changed = with_refit_steps(changed)
        try:
            shapes.append((changed, carved_config(dense, changed, str(source))))
        except UserError as error:
            shapes.append(None)
            row["not_possible"] = str(error)
        tried.append(row)
    chosen = sorted({int((number + 0.5) * dense.layers / layers) for number in range(layers)})
    streams = CalibrationStreams(checkpoint, options.calibration, options.calibration_tokens, options.seed)
    branches: list[Branch] = []
    with progress_bar() as bar:
        task = bar.add_task("exploring", total=dense.layers)
        for layer in range(dense.layers):
            weights = streams.layers.weights(layer)
            for branch in branches:
                branch.streams = [streams.layers.through(layer, weights, x_BTD) for x_BTD in branch.streams]
            texts = streams.enter(layer)
            if layer in chosen:
                for point, shape in enumerate(shapes):
                    if shape is not None:
                        tensors, _ = carve_layer(checkpoint, shape[1], layer, shape[0], texts)
                        branches.append(Branch(point, layer, streams.held_out_through(layer, shape[1], tensors)))
            streams.pass_by()
            bar.update(task, advance=1)
    batches = streams.batches[streams.fitted :]
    for point, (row, shape) in enumerate(zip(tried, shapes, strict=True)):
        if shape is None:
            continue
        figures = [
            streams.layers.next_token(branch.streams, streams.dense[streams.fitted :], batches, streams.unigram)
            for branch in branches
            if branch.point == point
        ]
        total, active = count(shape[1])
        row |= {
            "layers": {
                str(layer): {"loss_above_dense": one.loss_above_reference, "kl_divergence": one.kl_divergence}
                for layer, one in zip(chosen, figures, strict=True)
            },
            "loss_above_dense": dense.layers * float(np.mean([one.loss_above_reference for one in figures])),
            "kl_divergence": dense.layers * float(np.mean([one.kl_divergence for one in figures])),
            "parameters": total,
            "active": active,
            "tokens_per_second": tokens_per_second(shape[1]),
        }
    report = {"source": str(source), "layers": chosen, "points": tried}
    directory = Path(destination)
    directory.mkdir(parents=True)
    with atomic_write(directory / REPORT) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _plot(tried, directory / PLOT)
    return Manifest(
        {"command": "carve", **dataclasses.asdict(options)}, dense, checkpoint.directory.name, figures=report
    )


def tokens_per_second(config: ModelConfig) -> float:
    """Decoding one sequence through all layers, from the time that two of them with random weights take."""
    small = config.replace(layers=TIMED_LAYERS, vocab=TIMED_VOCABULARY)
    params = initialize(small, jax.random.key(0))
    for _ in range(2):  # the first compiles
        tokens = iter(generate(small, params, [[1] * 16], TIMED_TOKENS))
        next(tokens)
        started = time.perf_counter()
        made = sum(1 for _ in tokens)
    return made / (time.perf_counter() - started) * TIMED_LAYERS / config.layers


def _command(source: str | Path, options: CarveOptions) -> str:
    """The carve that a point stands for, with as much text as carves take by default."""
    defaults = CarveOptions()
    options = dataclasses.replace(
        options, calibration_tokens=defaults.calibration_tokens, explore_layers=defaults.explore_layers
    )
    words = ["nemoe-convert", "carve", str(source), "DST"]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value == getattr(defaults, field.name) and field.name not in ("experts", "top_k"):
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(value if isinstance(value, tuple) else (str(value),))]
    return " ".join(words)


def table(report: dict[str, Any]) -> str:
    """The points as lines for people."""
    lines = [f"{'':4}" + "".join(f"{name.replace('_', ' '):>20}" for name in COLUMNS)]
    for number, row in enumerate(report["points"]):
        if "not_possible" in row:
            cells = f"  {row['not_possible']}"
        else:
            values = (row[name] for name in COLUMNS)
            cells = "".join(f"{v:>20,}" if isinstance(v, int) else f"{v:>20.3f}" for v in values)
        lines += [f"{number:>3} {cells}", f"      {row['command']}"]
    return "\n".join(lines)


def _plot(rows: list[dict[str, Any]], target: Path) -> None:
    """Estimated loss over active parameters; controls as crosses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    points = [
        (row["active"], row["loss_above_dense"], number) for number, row in enumerate(rows) if "not_possible" not in row
    ]
    least_gap = 0.05 * max((loss for _, loss, _ in points), default=0.0)
    free: dict[int, float] = {}  # above the labels so far, for points below one another
    for active, loss, number in sorted(points):
        axes.plot(active, loss, "x" if "--control" in rows[number]["command"] else "o", color="#3b6ea5")
        height = max(loss, free.get(active, loss))
        axes.annotate(f"  {number}", (active, height), va="center")
        free[active] = height + least_gap
    axes.set(xlabel="active parameters", ylabel="estimated loss above dense, nats")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(target) as partial:
        figure.savefig(partial, format="png", dpi=100)
