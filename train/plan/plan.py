"""`nemoe-train plan`: does a recipe fit a TPU slice, what does its step send and compute, and what to change if not.

The answer comes from the TPU's own compiler (aot.py), on a machine without TPU. What a change would save is an
estimate: temporaries are split into what grows with the tokens on a device and what does not.

B rows of a batch, T tokens of a row, D embed, V vocabulary, L layers.
"""

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nemoe_jax.errors import UserError
from train import recipe as recipes

if TYPE_CHECKING:
    from train.plan.aot import Step

ENVIRONMENT = {  # read when JAX and libtpu load
    "JAX_PLATFORMS": "cpu",  # a TPU that is there stays free
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",  # no questions to the metadata server of a cloud machine, nor waiting for its answers
    "TPU_ACCELERATOR_TYPE": "v5e-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is compiled for absent devices cannot be loaded
}
# cut over all devices, but for data's copies
SPREAD = ("frozen weights", "trained weights", "optimizer state", "teacher")


def plan(
    recipe: recipes.Recipe, topology: str, phase: int | None = None, hlo_file: Path | None = None
) -> dict[str, Any]:
    """The figures that `--json` prints.

    Args:
        phase: number of the recipe's phase; by default that which trains most.
        hlo_file: where to write the program's text.
    Raises:
        UserError: no libtpu, no such topology, or a recipe that does not fit together.
    """
    os.environ.update(ENVIRONMENT)
    from train.plan import aot  # JAX and libtpu load here

    devices = aot.topology_devices(topology)
    step = aot.build_step(recipe, devices, phase)
    figures: dict[str, Any] = {
        "model": str(recipe.model or "scratch"),
        "phase": step.phase.name,
        "trainable": step.phase.trainable,
        "topology": topology,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "mesh": dict(step.mesh.shape),
        "batch": [step.phase.data.batch_size, step.phase.data.sequence_length],
        "accumulation": step.phase.data.accumulation,
        "limit": aot.memory_limit(devices[0]),
    }
    try:
        with Console(stderr=True).status(f"compiling for {len(devices)} × {devices[0].device_kind}: a minute or more"):
            compiled, seconds = aot.compile_step(step)
        figures |= aot.measure(step, compiled) | {"compile_seconds": round(seconds, 1)}
    except aot.OutOfMemory as error:
        arguments = step.bytes_by_kind()
        beside = max(error.wanted - sum(arguments.values()), 0)
        memory = arguments | {"temporaries": beside, "total": error.wanted}
        figures |= {"limit": error.available, "memory": memory, "collectives": None, "flops": aot.step_flops(step)}
    figures["fits"] = figures["limit"] is None or figures["memory"]["total"] <= figures["limit"]
    if not figures["fits"]:
        figures["changes"] = [
            dataclasses.asdict(change) for change in advise(step, figures["memory"], figures["limit"])
        ]
    if hlo_file and "compile_seconds" in figures:
        _write(hlo_file, aot.text_of(compiled))
    return figures


def _write(path: Path, text: str | None) -> None:
    if text is None:
        raise UserError(f"--hlo: {path}: libtpu does not give the text of this program")
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise UserError(f"--hlo: {path}: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class Change:
    """Something to change in a recipe, and an estimate of what it does."""

    change: str
    saves: int  # bytes per device
    total: int  # what would be left
    fits: bool


def advise(step: "Step", memory: dict[str, int], limit: int) -> list[Change]:
    """What would make it smaller, by estimate: first what would be enough, the mildest first; then the rest."""
    changes = [
        Change(text, round(saved), round(memory["total"] - saved), memory["total"] - saved <= limit)
        for text, saved in _changes(step, memory, limit)
        if saved > 0.01 * limit
    ]
    return sorted(changes, key=lambda change: (not change.fits, change.saves if change.fits else -change.saves))


def _changes(step: "Step", memory: dict[str, int], limit: int) -> Iterator[tuple[str, float]]:
    """(change, bytes that it saves on a device)."""
    recipe, data, config = step.recipe, step.phase.data, step.config
    shape, devices = step.mesh.shape, step.mesh.size
    grows = memory["temporaries"] - _constant_temporaries(step, memory)
    tokens = step.tokens / data.accumulation / devices * shape.get("tensor", 1)  # on a device at once
    kept = config.layers * tokens * config.hidden * (2 if recipe.dtype == "bfloat16" else 4)  # the input of each layer
    grows = max(grows, kept, 0.0)
    spread = sum(memory[kind] for kind in SPREAD)

    if not recipe.remat:
        yield "remat=true", grows - kept - (grows - kept) / config.layers
    if recipe.dtype == "float32":
        yield "dtype=bfloat16", (memory["frozen weights"] + memory["teacher"] + grows) / 2
    yield from _accumulations(step, grows, memory["total"] - limit, memory["trained weights"])
    if shape.get("data", 1) > 1:
        wider = shape.get("fsdp", 1) * shape["data"]
        yield f"mesh: fsdp={wider} instead of data={shape['data']}", spread * (1 - 1 / shape["data"])
    yield f"twice the chips ({2 * devices})", (spread * (shape.get("data", 1) < devices) + grows) / 2
    yield f"data.sequence_length={data.sequence_length // 2}", grows / 2
    if data.batch_size % 2 == 0:
        yield f"data.batch_size={data.batch_size // 2}", grows / 2
    yield f"logits_chunk={max(recipe.logits_chunk // 2, 1)}", _logits(step) / 2
    if step.phase.lora:
        rank = max(target.rank for target in step.phase.lora)
        yield f"LoRA rank {rank // 2} instead of {rank}", memory["trained weights"] + memory["optimizer state"] / 2


def _accumulations(step: "Step", grows: float, wanted: float, accumulators: float) -> Iterator[tuple[str, float]]:
    """A batch in more parts: as few as would be enough, or as many as there can be."""
    from train.run.auto_mesh import auto_mesh

    data, saved, change = step.phase.data, 0.0, ""
    for parts in range(data.accumulation + 1, data.batch_size + 1):
        if data.batch_size % parts or saved >= wanted:
            continue
        try:
            mesh = auto_mesh(step.config, step.mesh.size, data.batch_size // parts, data.sequence_length)
        except UserError:
            continue
        text = ",".join(f"{name}={size}" for name, size in mesh.items())
        change = f"data.accumulation={parts} mesh={text}"
        saved = grows * (1 - data.accumulation / parts) - (accumulators if data.accumulation == 1 else 0)
    if change:
        yield change, saved


def _logits(step: "Step") -> float:
    """Bytes of one chunk's logits: in float32 as they are, as probabilities and as their gradient."""
    models = 2 if step.teacher_config else 1
    return 3 * models * step.recipe.logits_chunk * step.config.vocab * 4 / step.mesh.shape.get("tensor", 1)


def _constant_temporaries(step: "Step", memory: dict[str, int]) -> float:
    """Bytes that do not go by the tokens: gathered heads, a layer's gathered weights twice, gradients, logits."""
    from nemoe_jax.spec.schema import declare, leaves

    itemsize = 2 if step.recipe.dtype == "bfloat16" else 4
    total = _logits(step) + memory["trained weights"]
    for config in filter(None, (step.config, step.teacher_config)):
        specs = [spec for spec in leaves(declare(config)).values() if "layers" in spec.stacked]
        layer = max(
            sum(math.prod(spec.shape) / spec.shape[0] for spec in specs if f"blocks/{run.kind}/" in spec.path)
            for run in config.runs
        )
        own = step.mesh.shape.get("expert", 1) if config.experts else 1
        total += itemsize * (config.vocab * config.hidden + 2 * layer / own) / step.mesh.shape.get("tensor", 1)
    return total


def render(figures: dict[str, Any]) -> Iterator[str]:
    """The figures as lines to read."""
    rows, length = figures["batch"]
    mesh = ",".join(f"{name}={size}" for name, size in figures["mesh"].items())
    parts = f" in {figures['accumulation']} parts" if figures["accumulation"] > 1 else ""
    phase = f"phase {figures['phase']} ({figures['trainable']})"
    yield f"{figures['model']}, {phase}, {rows} rows of {length} tokens{parts}"
    yield f"{figures['topology']}: {figures['devices']} × {figures['device_kind']}, mesh {mesh}"
    memory, limit, amounts = figures["memory"], figures["limit"], figures["flops"]
    yield "\nmemory per device        10^9 bytes"
    for kind, size in memory.items():
        yield f"  {kind:<22}{size / 1e9:>12.3f}"
    if limit:
        verdict = "fits" if figures["fits"] else "DOES NOT FIT"
        yield f"  {'limit of the chip':<22}{limit / 1e9:>12.3f}   {verdict}: {memory['total'] / limit:.0%} used"
    if figures["collectives"] is not None:
        yield "\nsent per step              count   beside work   10^9 bytes per device"
        for kind, row in figures["collectives"].items():
            yield f"  {kind:<22}{row['count']:>8}{row['asynchronous']:>14}{row['bytes'] / 1e9:>24.3f}"
    elif "compile_seconds" in figures:
        yield "\nlibtpu does not give the text of this program: what is sent, and what is executed, is not known"
    yield "\nFLOPs"
    yield f"  model, per token      {amounts['model_per_token']:>12.4g}"
    yield f"  model, per step       {amounts['model_per_step']:>12.4g}"
    if amounts["executed_per_step"]:
        ratio = amounts["executed_over_model"]
        yield f"  executed, per step    {amounts['executed_per_step']:>12.4g}   {ratio:.3f} × the model's"
    if seconds := amounts["seconds_at_peak"]:
        speed = rows * length / seconds
        yield f"  seconds at peak       {seconds:>12.3f}   no step can be faster: at most {speed:,.0f} tokens/s"
    if "compile_seconds" in figures:
        yield f"\ncompiled in {figures['compile_seconds']:.0f} s"
    if not figures["fits"]:
        yield "\nchanges, by estimate    saves 10^9 bytes   leaves"
        for change in figures["changes"]:
            enough = "fits" if change["fits"] else "not enough alone"
            yield f"  {change['change']:<44}{change['saves'] / 1e9:>8.2f}{change['total'] / 1e9:>9.2f}  {enough}"
