"""`nemoe-train plan`: does a recipe fit a TPU slice or a GPU, what does its step send, and what to change if not.

The answer comes from the device's own compiler (aot.py), on a machine without it; so does what a change would save.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
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
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


def plan(
    recipe: recipes.Recipe, topology: str, phase: int | None = None, hlo_file: Path | None = None
) -> dict[str, Any]:
    """The figures that `--json` prints.

    Args:
        phase: number of the recipe's phase; by default that which trains most.
        hlo_file: where to write the program's text.
    Raises:
        UserError: no compiler for it, no such topology, or a recipe that does not fit together.
    """
    os.environ.update(ENVIRONMENT)
    import jax  # or has been loaded, with the recipe

    from train.plan import aot

    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for absent devices cannot be loaded
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
        "gradient_accumulation_steps": step.phase.data.gradient_accumulation_steps,
        "limit": aot.memory_limit(devices[0]),
    }
    try:
        with Console(stderr=True).status(f"compiling for {len(devices)} × {devices[0].device_kind}: a minute or more"):
            compiled, seconds = aot.compile_step(step)
        figures |= aot.measure(step, compiled) | {"compile_seconds": round(seconds, 1)}
    except aot.OutOfMemory as error:
        arguments = step.bytes_by_kind()
        beside = max(error.expected - sum(arguments.values()), 0)
        memory = arguments | {"temporaries": beside, "total": error.expected}
        figures |= {"limit": error.available, "memory": memory, "collectives": None, "flops": aot.step_flops(step)}
    figures["fits"] = figures["limit"] is None or figures["memory"]["total"] <= figures["limit"]
    if not figures["fits"]:
        figures["changes"] = [dataclasses.asdict(change) for change in advise(step, devices, figures["limit"])]
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
    """Changes to a recipe, and what its step then needs on a device."""

    change: str
    total: int  # bytes
    fits: bool


def advise(step: "Step", devices: list[Any], limit: int) -> list[Change]:
    """Changes to the recipe, each with those before it, compiled one after another until one fits.

    The mildest comes first: recomputed activations, bfloat16, then more and smaller microbatches.
    """
    from train.plan import aot

    changes: list[Change] = []
    recipe, words = step.recipe, dict[str, str]()
    phase = recipe.phases.index(step.phase)
    for text, changed in _candidates(step, len(devices)):
        words[text.partition("=")[0]] = text
        recipe = changed(recipe)
        total = aot.total_memory(aot.build_step(recipe, devices, phase))
        changes.append(Change(" ".join(words.values()), total, total <= limit))
        if changes[-1].fits:
            break
    return changes


def _candidates(step: "Step", devices: int) -> Iterator[tuple[str, Callable[[recipes.Recipe], recipes.Recipe]]]:
    """(what changes, the recipe with that change)."""
    from train.run.auto_mesh import auto_mesh

    if not step.recipe.remat:
        yield "remat=true", lambda recipe: recipe.model_copy(update={"remat": True})
    if step.recipe.dtype == "float32":
        yield "dtype=bfloat16", lambda recipe: recipe.model_copy(update={"dtype": "bfloat16"})
    data, found = step.phase.data, []
    for parts in range(data.gradient_accumulation_steps + 1, data.batch_size + 1):
        if data.batch_size % parts == 0:
            with contextlib.suppress(UserError):  # no division of the devices fits so few rows
                auto_mesh(step.config, devices, data.batch_size // parts, data.sequence_length)
                found.append(parts)
    for parts in dict.fromkeys([*found[:1], *found[-1:]]):  # the fewest, and as many as there can be
        yield f"data.gradient_accumulation_steps={parts} mesh=auto", functools.partial(_in_microbatches, parts)


def _in_microbatches(parts: int, recipe: recipes.Recipe) -> recipes.Recipe:
    phases = [
        phase.model_copy(update={"data": phase.data.model_copy(update={"gradient_accumulation_steps": parts})})
        for phase in recipe.phases
    ]
    return recipe.model_copy(update={"phases": phases, "mesh": "auto"})


def render(figures: dict[str, Any]) -> Iterator[str]:
    """The figures as lines to read."""
    rows, length = figures["batch"]
    mesh = ",".join(f"{name}={size}" for name, size in figures["mesh"].items())
    accumulated = figures["gradient_accumulation_steps"]
    parts = f" in {accumulated} microbatches" if accumulated > 1 else ""
    phase = f"phase {figures['phase']} ({figures['trainable']})"
    yield f"{figures['model']}, {phase}, {rows} rows of {length} tokens{parts}"
    yield f"{figures['topology']}: {figures['devices']} × {figures['device_kind']}, mesh {mesh}"
    memory, limit, amounts = figures["memory"], figures["limit"], figures["flops"]
    yield "\nmemory per device        10^9 bytes"
    for kind, size in memory.items():
        yield f"  {kind:<22}{size / 1e9:>12.3f}"
    if limit:
        verdict = "fits" if figures["fits"] else "DOES NOT FIT"
        yield f"  {'limit of the device':<22}{limit / 1e9:>12.3f}   {verdict}: {memory['total'] / limit:.0%} used"
    if figures["collectives"] is not None:
        yield "\nsent per step              count   beside work   10^9 bytes per device"
        for kind, row in figures["collectives"].items():
            yield f"  {kind:<22}{row['count']:>8}{row['asynchronous']:>14}{row['bytes'] / 1e9:>24.3f}"
    elif "compile_seconds" in figures:
        yield "\nthis program cannot be read: what is sent, and what is executed, is not known"
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
        yield "\nchanges, compiled       10^9 bytes"
        for change in figures["changes"]:
            yield f"  {change['total'] / 1e9:>12.3f}   {'fits' if change['fits'] else 'not enough'}: {change['change']}"
        if not any(change["fits"] for change in figures["changes"]):
            yield "  none is enough: more chips, shorter rows (data.sequence_length), or a lower LoRA rank"
