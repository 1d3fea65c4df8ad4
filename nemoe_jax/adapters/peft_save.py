"""Adapter trees as directories that Hugging Face PEFT loads: adapter_config.json and adapter_model.safetensors.

A layer is gathered from the devices and written to its place in the file; no more than that is on the host.

A weight that was trained whole, such as a router, is written as the update that it amounts to, W' - W = (W' - W) · I: a
low-rank update of full rank, which is exact and which every reader of adapters knows. (PEFT's modules_to_save replaces
the tensor instead; few other tools read that.)
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nemoe_jax.adapters import lora
from nemoe_jax.adapters.lora import Adapter
from nemoe_jax.adapters.peft_config import CONFIG
from nemoe_jax.adapters.peft_export import Experts, Part, adapter_parts
from nemoe_jax.adapters.peft_format import WEIGHTS
from nemoe_jax.checkpoints.safetensors_file import header_of, is_finite
from nemoe_jax.errors import UserError
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.spec.schema import Tree, leaves, unflatten
from nemoe_jax.utils.distributed import barrier
from nemoe_jax.utils.file_copy import write_at
from nemoe_jax.utils.output_path import check_room, refuse_existing, staging_path
from nemoe_jax.utils.progress import progress_bar

_PREFIX = "base_model.model."


def save_adapters(
    directory: str | Path,
    config: ModelConfig,
    adapters: Tree,
    *,
    base_model: str,
    changes: Mapping[str, Any] | None = None,
    experts: Experts = "fused",
    progress: bool = False,
) -> None:
    """Writes a PEFT adapter in float32; complete or not at all. Every process of a job calls it, the first one writes.

    Args:
        base_model: name or directory of the adapted model, by which PEFT finds it.
        changes: {path: new minus old, float32} of weights that were trained whole; what an adapter of the same weight
            does comes on top.
        experts: "fused" as transformers 5 has them, or "linear", a module for each expert's matrix, as it was before.
        progress: show a progress bar on a terminal.

    Raises:
        UserError: the directory exists or cannot be written, the disk has no room, there is nothing to write, or NaN.
    """
    target = Path(directory)
    refuse_existing(target)
    barrier("save adapters")
    updates = leaves(adapters) | _as_adapters(config, adapters, changes or {})
    if not updates:
        raise UserError(f"{directory}: no adapters to write")
    parts = list(adapter_parts(config, updates, experts))
    shapes = {_PREFIX + name: shape for part in parts for name, shape in part.shapes.items()}
    header, offsets, _ = header_of({name: (shape, "float32") for name, shape in shapes.items()})
    content = _config(config, updates, parts, base_model)
    with _written(target) as file, progress_bar(visible=progress and file is not None) as bar:
        if file is not None:
            check_room(target, len(header) + sum(4 * math.prod(shape) for shape in shapes.values()))
            write_at(file, 0, np.frombuffer(header, np.uint8))
        for part in bar.track(parts, description=f"writing {target.name}"):
            for (name, shape), tensor in zip(part.shapes.items(), part.read(), strict=True):
                assert tensor.shape == shape, f"{name}: expected {shape}, got {tensor.shape}"
                tensor = np.ascontiguousarray(tensor)
                if not is_finite(tensor):  # in every process, so that all of them stop
                    raise UserError(f"{target}: {name}: NaN or infinite values")
                if file is not None:
                    write_at(file, offsets[_PREFIX + name], tensor)
        if file is not None:
            (staging_path(target) / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    barrier("adapters saved")


@contextlib.contextmanager
def _written(target: Path) -> Iterator[int | None]:
    """The weight file in a directory that takes its name at the end, or vanishes; None where another process writes."""
    if jax.process_index() != 0:
        yield None
        return
    partial = staging_path(target)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        file = os.open(partial / WEIGHTS, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            yield file
        finally:
            os.close(file)
        partial.rename(target)
    except OSError as error:
        raise UserError(f"{error.filename or partial}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _as_adapters(config: ModelConfig, adapters: Tree, changes: Mapping[str, Any]) -> dict[str, Adapter]:
    """Changes of whole weights as adapters: the change times the identity, on the side where that is smaller."""
    specs, given = leaves(schema.declare(config)), leaves(adapters)
    updates: dict[str, Adapter] = {}
    for path, change in changes.items():
        spec = specs[path]
        if not spec.contracted:
            raise UserError(f"{path}: was trained whole and is no linear map; an adapter cannot hold it, a model can")
        if path in given:
            merged = lora.merge(config, unflatten({path: change}), unflatten({path: given[path]}))
            change = leaves(merged)[path]
        rank = min(spec.matrix_shape)
        a, b = lora.factors(spec, rank)
        narrow = spec.matrix_shape[1] == rank
        identity = np.eye(rank, dtype=np.float32)
        if narrow:
            b_values = np.broadcast_to(identity.reshape(b.shape[len(spec.stacked) :]), b.shape)
            updates[path] = Adapter(change.reshape(a.shape), b_values, 1.0)
        else:
            a_values = np.broadcast_to(identity.reshape(a.shape[len(spec.stacked) :]), a.shape)
            updates[path] = Adapter(a_values, change.reshape(b.shape), 1.0)
    return updates


def _config(
    config: ModelConfig, adapters: dict[str, Adapter], parts: Sequence[Part], base_model: str
) -> dict[str, Any]:
    """The content of adapter_config.json."""
    named = {name.name: name for part in parts for name in part.names}
    sizes = {name: (value.rank, _number(value.rank * value.scale)) for name, value in named.items()}
    short = _shortened(config, sizes)
    parameters = {short[name] for name, value in named.items() if value.parameter}
    by_short = {short[name]: size for name, size in sizes.items()}
    # PEFT fuses the modules w1 and w3, and takes their rank from nowhere else than the default
    rank, alpha = by_short.get("w1") or Counter(sizes.values()).most_common(1)[0][0]
    for module, parameter in _RENAMED.items():
        if module in by_short:
            by_short[parameter] = by_short[module]
    specs = leaves(schema.declare(config))
    # PEFT knows no dropout of an update of a parameter
    plain = not parameters and not any("experts" in specs[path].stacked for path in adapters)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(adapter.dropout for adapter in adapters.values()) if plain else 0.0,
        "rank_pattern": {name: size[0] for name, size in by_short.items() if size[0] != rank},
        "alpha_pattern": {name: size[1] for name, size in by_short.items() if size[1] != alpha},
        "target_modules": sorted({short[name] for name in named} - parameters),
        "target_parameters": sorted(parameters),
        "ensure_weight_tying": config.tied and "embed" in adapters,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


_RENAMED = {"w2": "down_proj", "gate": "gate.weight"}  # Mixtral's modules that are parameters in transformers 5


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _shortened(config: ModelConfig, sizes: Mapping[str, Any]) -> dict[str, str]:
    """What the config calls each module: one name for those of all layers, where all of them are there and alike."""

    def short(name: str) -> str:
        return re.sub(r"^model\.layers\.\d+\.(block_sparse_moe\.(experts\.\d+\.)?)?", "", name)

    keys = [key for spec in leaves(schema.declare(config)).values() for _, key in spec.tensors()]
    there = Counter(short(FAMILIES[config.family].module_of(key)) for key in keys)
    found: dict[str, list[Any]] = {}
    for name, size in sizes.items():
        found.setdefault(short(name), []).append(size)
    alike = {name for name, group in found.items() if len(set(group)) == 1 and len(group) >= there[name]}
    return {name: short(name) if short(name) in alike else name for name in sizes}
