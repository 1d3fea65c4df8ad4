"""Ahead of time: a recipe's training step, compiled for a TPU slice or GPUs that are not there.

libtpu's compiler needs no TPU: it takes a topology such as v5e:4x4, the shapes of all arrays and where they lie, and
gives the very program that would run, or says that it does not fit. No weight is read and no array is made. JAX's
plugin for CUDA needs no card either (absent_gpu.py).

    step = build_step(recipe, topology_devices("v5e:4x4"))
    compiled, seconds = compile_step(step)
    figures = measure(step, compiled)

What is read off: bytes per device by kind, transfers between devices, FLOPs of the model and of the program. What is
not: how fast it runs. The time is a lower bound, the program's matrix products at the chip's peak.
"""

import dataclasses
import importlib.util
import math
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from nemoe_jax.adapters import lora
from nemoe_jax.checkpoints import reader
from nemoe_jax.errors import UserError
from nemoe_jax.spec import schema, sharding
from nemoe_jax.spec.config import PRESETS, ModelConfig
from nemoe_jax.text.tokenizers.load import load_tokenizer
from train.data.loader import Batch, PairBatch
from train.data.teacher_cache import TeacherBatch
from train.plan import absent_gpu, hlo, hlo_flops
from train.recipe import Phase, Recipe
from train.run import prepare
from train.step import model_flops
from train.step.batch_sharding import batch_sharding
from train.step.optimizer import learning_rate_schedule, make_optimizer
from train.step.preference import SEGMENTS, make_objective
from train.step.step import make_update, state_shape

EXAMPLES = "v5e:4x4, v5e:2x4, v5p:2x2x4, v4:2x2x4, v6e:4x4, h100, h100:8, h200, rtx4090"
TOKENS_OF_A_RESPONSE = 512
KINDS = ("frozen weights", "trained weights", "optimizer state", "teacher", "batch")


class OutOfMemory(Exception):
    """The compiler says that the program does not fit."""

    def __init__(self, expected: int, available: int):
        super().__init__(f"needs {expected} bytes on a device that has {available}")
        self.expected, self.available = expected, available


@dataclasses.dataclass(frozen=True)
class Step:
    """What is compiled: a phase of a recipe on a mesh of devices, as shapes."""

    recipe: Recipe
    phase: Phase
    config: ModelConfig
    teacher_config: ModelConfig | None
    targets: list[lora.Target]
    mesh: jax.sharding.Mesh
    arguments: tuple[Any, ...]  # (state, frozen, teacher, batch) of `step.make_update`, as ShapeDtypeStructs
    update: Any

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of the arguments on one device, without the padding that the compiler may add."""
        state, frozen, teacher, batch = self.arguments
        optimizer_state = (state.optimizer_state, state.step, state.skipped, state.key)
        kinds = (frozen, state.trainable, optimizer_state, teacher, batch)
        return dict(zip(KINDS, map(_bytes_on_a_device, kinds), strict=True))

    @property
    def tokens(self) -> int:
        """Tokens of one step, over all devices."""
        return self.phase.data.batch_size * self.phase.data.sequence_length


def topology_devices(topology: str) -> list[Any]:
    """The devices of a TPU slice, or the cards of a machine, that need not be there.

    Raises:
        UserError: the compiler is not installed, or it knows no such topology.
    """
    name, _, count = topology.partition(":")
    if name in absent_gpu.CARDS:
        if not re.fullmatch(r"[1-9]\d*", count or "1"):
            raise UserError(f"--topology: {topology}: expected a number of cards behind the colon, got {count}")
        return absent_gpu.absent_gpus(name, int(count or 1))
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("plan: expected libtpu, the TPU compiler, which is not installed: pip install 'nemoe-jax[tpu]'")
    # JAX sees the two cores of a v4 chip as one device, the topology only when told so
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except Exception as error:  # whatever libtpu makes of a name that it does not know
        reason = str(error).partition("\n")[0]
        raise UserError(f"--topology: {topology}: expected one such as {EXAMPLES}; libtpu says: {reason}") from error


def model_config(name: Path | str, key: str) -> ModelConfig:
    """The config of a model directory, or of a preset where there is no such directory.

    Raises:
        UserError: neither, or a bad config.json.
    """
    if Path(name).is_dir() or str(name) not in PRESETS:
        if not Path(name).is_dir():
            raise UserError(f"{key}: {name}: neither a directory nor a preset; the presets are {', '.join(PRESETS)}")
        return reader.read_config(name)
    return PRESETS[str(name)]


def build_step(recipe: Recipe, devices: list[Any], phase_number: int | None = None) -> Step:
    """The step of a phase, counted from 0 (by default that which trains most), as shapes on a mesh of the devices.

    Raises:
        UserError: what does not fit together; see `prepare.check_fit`.
    """
    if recipe.mesh is None:
        recipe = recipe.model_copy(update={"mesh": "auto"})
    if recipe.model:
        config = model_config(recipe.model, "model")
    else:
        config = recipe.scratch_config(load_tokenizer(recipe.tokenizer or ""))
    targets = [prepare.targets_of(phase, config) for phase in recipe.phases]
    if phase_number is None:
        sizes = [_trained_elements(recipe, phase, config, targets[n]) for n, phase in enumerate(recipe.phases)]
        phase_number = sizes.index(max(sizes))
    phase, targets_of_phase = recipe.phases[phase_number], targets[phase_number]
    teacher_config = model_config(phase.distill.teacher, "distill.teacher") if phase.distill else None
    mesh = prepare.recipe_mesh(recipe, config, devices)
    assert mesh is not None
    sizes_of_mesh = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    prepare.check_fit(recipe.model_copy(update={"mesh": sizes_of_mesh}), phase, config, teacher_config)

    scale = np.ones((config.layers - config.dense_layers, 1, 1), np.float32) if config.experts else None
    optimizer = make_optimizer(phase.optimizer, phase.steps, scale, config)
    trainable, frozen = prepare.abstract_trainable(recipe, phase, config, targets_of_phase, mesh)
    state = state_shape(trainable, optimizer, prepare.bias_shape(phase, config))
    offline = phase.distill is not None and phase.distill.offline is not None
    teacher = _abstract_model(teacher_config, recipe.dtype, mesh) if teacher_config and not offline else None
    shape = (phase.data.batch_size, phase.data.sequence_length)
    place = batch_sharding(shape[0], phase.data.gradient_accumulation_steps, mesh)
    batch = _abstract_batch(phase, shape, place)
    update = make_update(
        make_objective(recipe, phase, config, teacher_config, all_count=True),
        optimizer,
        learning_rate_schedule(phase.optimizer, phase.steps),
        state,
    )
    arguments = (state, frozen, teacher, batch)
    return Step(recipe, phase, config, teacher_config, targets_of_phase, mesh, arguments, update)


def _abstract_batch(phase: Phase, shape: tuple[int, int], place: NamedSharding) -> Any:
    """A batch's shapes; of pairs as if a response with its prompt took TOKENS_OF_A_RESPONSE."""

    def array(dtype: Any, sharding: NamedSharding = place, shape: tuple[int, ...] = shape) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    text = {field.name: array(jnp.int32) for field in dataclasses.fields(Batch)} | {"mask": array(jnp.float32)}
    if phase.distill and phase.distill.offline:
        kept = (*shape, phase.distill.top_k)
        ids, logprobs = (array(dtype, shape=kept) for dtype in (jnp.int32, jnp.float32))
        return TeacherBatch(**text, teacher_ids=ids, teacher_logprobs=logprobs)
    if phase.preference is None:
        return Batch(**text)
    of_rows, group = NamedSharding(place.mesh, PartitionSpec(place.spec[0])), SEGMENTS.get(phase.preference.loss, 2)
    slots = group * max(shape[1] // (group * TOKENS_OF_A_RESPONSE), 1)
    per_slot = array(jnp.float32, of_rows, (shape[0], slots))
    return PairBatch(**text, reference=per_slot, scores=per_slot, items=array(jnp.int32, of_rows, shape[:1]))


def compile_step(step: Step) -> tuple[Any, float]:
    """The compiled program, and the seconds that it took.

    Raises:
        OutOfMemory: it does not fit.
    """
    started = time.monotonic()
    with jax.set_mesh(step.mesh):
        lowered = step.update.lower(*step.arguments)
        try:
            return lowered.compile(), time.monotonic() - started
        except jax.errors.JaxRuntimeError as error:
            raise read_out_of_memory(str(error)) or error from None


_SIZE = r"([\d.]+)([KMGT]?)i?B?"
_OUT_OF_MEMORY = (
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)


def read_out_of_memory(message: str) -> OutOfMemory | None:
    """What the compiler's message says of memory, if that is what it complains of."""
    for pattern in _OUT_OF_MEMORY:
        if found := pattern.search(message):
            wanted, available = (
                int(float(number) * 1024 ** (" KMGT".index(unit or " ")))
                for number, unit in (found.groups()[:2], found.groups()[2:])
            )
            return OutOfMemory(wanted, available)
    return None


def memory_limit(device: Any) -> int | None:
    """Bytes of a device that a program can use; of a TPU what the compiler says of one that wants far too many."""
    if device.platform != "tpu":
        return absent_gpu.usable_bytes(device.device_kind)
    enormous = jax.ShapeDtypeStruct((1 << 40,), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(enormous).compile()
    except jax.errors.JaxRuntimeError as error:
        found = read_out_of_memory(str(error))
        return found.available if found else None
    return None


def _trained_elements(recipe: Recipe, phase: Phase, config: ModelConfig, targets: list[lora.Target]) -> int:
    specs = schema.leaves(schema.declare(config))
    weights = sum(math.prod(spec.shape) for path, spec in specs.items() if prepare.trains(phase, path))
    return weights + sum(array.size for array in jax.tree.leaves(lora.abstract(config, targets)))


def _abstract_model(config: ModelConfig, dtype: str, mesh: jax.sharding.Mesh) -> schema.Tree:
    return jax.tree.map(
        lambda spec, place: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype), sharding=place),
        schema.declare(config),
        sharding.shardings(config, mesh),
    )


def _bytes_on_a_device(tree: Any) -> int:
    def size(array: Any) -> int:
        bits = 4 if array.dtype == jnp.uint4 else 8 * array.dtype.itemsize
        return math.prod(array.sharding.shard_shape(array.shape)) * bits // 8

    return sum(map(size, jax.tree.leaves(tree)))


def measure(step: Step, compiled: Any) -> dict[str, Any]:
    """What the compiled program takes and does: `memory` (bytes per device), `collectives` and `flops` (per step).

    The program's text is not to be had or read everywhere; without it `collectives` and the executed FLOPs are None.
    """
    analysis = compiled.memory_analysis()  # before the text, which libtpu may refuse
    arguments = step.bytes_by_kind()
    memory = {
        **arguments,
        "padding": analysis.argument_size_in_bytes - sum(arguments.values()),
        "temporaries": analysis.temp_size_in_bytes,
        "output - aliased": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }
    memory["total"] = sum(memory.values())
    # on GPUs products are calls of libraries, which say nothing of their FLOPs
    text = text_of(compiled) if step.mesh.devices.flat[0].platform not in ("cuda", "gpu") else None
    program = hlo.parse(text) if text else None
    return {
        "memory": memory,
        "collectives": _collectives(program) if program else None,
        "flops": _all_flops(step, program) if program else step_flops(step),
    }


def total_memory(step: Step) -> int:
    """Bytes that the compiled step takes on a device, whether it fits or not."""
    try:
        return measure(step, compile_step(step)[0])["memory"]["total"]
    except OutOfMemory as error:
        return error.expected


def text_of(compiled: Any) -> str | None:
    """The program's text; None where libtpu refuses it, as it does for some programs of large chips."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None


def _collectives(program: hlo.Program) -> dict[str, dict[str, int]]:
    """{kind: {count, asynchronous, bytes that one device sends}} of one step."""
    table: dict[str, dict[str, int]] = {}
    for one in program.collectives:
        row = table.setdefault(one.kind, {"count": 0, "asynchronous": 0, "bytes": 0})
        row["count"] += one.times
        row["asynchronous"] += one.times * one.asynchronous
        row["bytes"] += one.times * one.bytes
    return dict(sorted(table.items()))


def step_flops(step: Step) -> dict[str, float | None]:
    """FLOPs of the mathematics, and the time that they take at the chip's peak."""
    per_token = model_flops.of_phase(step.phase, step.config, step.targets, step.teacher_config)
    model = per_token * step.tokens
    return {
        "model_per_token": per_token,
        "model_per_step": model,
        "executed_per_step": None,
        "executed_over_model": None,
        "seconds_at_peak": _seconds(step, model),
    }


def _all_flops(step: Step, program: hlo.Program) -> dict[str, float | None]:
    of_model = step_flops(step)
    executed = hlo_flops.executed_flops(program, hlo_flops.attention_kernel_flops) * step.mesh.size
    return of_model | {
        "executed_per_step": executed,
        "executed_over_model": executed / (of_model["model_per_step"] or math.inf),
        "seconds_at_peak": _seconds(step, executed),
    }


def _seconds(step: Step, amount: float) -> float | None:
    peak = model_flops.peak_flops(step.mesh.devices.flat[0].device_kind)
    return amount / step.mesh.size / peak if peak else None
