"""Hugging Face model directories as sharded parameters, and back.

Loading asks each leaf of the schema for its slices: every device's shard is filled straight from the mapped file, and
no sharded leaf is whole on the host. Saving goes layer by layer.
"""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nemoe_jax.checkpoints.reader import Checkpoint, units
from nemoe_jax.checkpoints.writer import SHARD_BYTES, Writer
from nemoe_jax.spec import sharding
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import ParamSpec, Tree, declare, leaves, unflatten
from nemoe_jax.utils.progress import progress_bar


def load_pretrained(
    directory: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    rules: sharding.Rules = sharding.RULES,
    progress: bool = False,
) -> tuple[ModelConfig, Tree]:
    """Config and parameters of a model directory, each array on its devices (without a mesh: the first one).

    Args:
        dtype: dtype of the arrays; the config's own by default.
        progress: show a progress bar on a terminal.

    Raises:
        UserError: see `Checkpoint`; or the mesh does not fit the model.
    """
    checkpoint = Checkpoint(directory)
    placed = leaves(sharding.shardings(checkpoint.config, mesh, rules))
    dtype = jnp.dtype(dtype or checkpoint.config.dtype)
    params = {}
    with progress_bar(visible=progress) as bar:
        specs = leaves(declare(checkpoint.config))
        for path, spec in bar.track(specs.items(), description=f"loading {Path(directory).name}"):
            params[path] = _load_leaf(checkpoint, spec, placed[path], dtype)
    return checkpoint.config, unflatten(params)


def _load_leaf(checkpoint: Checkpoint, spec: ParamSpec, placed: jax.sharding.Sharding, dtype: Any) -> jax.Array:
    devices_of: dict[Any, list[jax.Device]] = {}  # replicas share one read
    indices = placed.addressable_devices_indices_map(spec.shape)
    for device, index in indices.items():
        assert index is not None  # every addressable device holds a part
        key = tuple(part.indices(size) for part, size in zip(index, spec.shape, strict=True))
        devices_of.setdefault(key, []).append(device)
    shards: dict[jax.Device, jax.Array] = {}
    for key, devices in devices_of.items():
        block = checkpoint.read(spec, tuple(slice(*part) for part in key), dtype)
        shards |= {device: jax.device_put(block, device) for device in devices}
    return jax.make_array_from_single_device_arrays(spec.shape, placed, [shards[device] for device in indices])


def save_pretrained(
    directory: str | Path,
    config: ModelConfig,
    params: Tree,
    *,
    tokenizer_from: str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model directory; complete or not at all. Every process of a job calls it, each writes some layers.

    Args:
        tokenizer_from: a directory whose tokenizer files are carried along.
        dtype: dtype on disk; the config's own by default.
        shard_bytes: a shard takes whole layers up to about this size, and at least one.

    Raises:
        UserError: the directory exists already.
    """
    config = config.replace(dtype=dtype or config.dtype)
    flat = leaves(params)
    by_unit = units(config)

    def produce(unit: int) -> dict[str, np.ndarray]:
        tensors = {}
        for path, refs in itertools.groupby(by_unit[unit], lambda ref: ref.spec.path):
            group = list(refs)
            layered = "layers" in group[0].spec.stacked
            array = sharding.on_host(flat[path][group[0].place[0]] if layered else flat[path])
            for ref in group:
                tensors[ref.key] = ref.spec.to_torch(array[ref.place[1:]] if layered else array)
        return tensors

    with Writer(directory, config, shard_bytes) as writer:
        for unit in range(len(by_unit)):
            tensors = produce(unit)
            if unit % jax.process_count() == jax.process_index():
                writer.write(unit, tensors)
        writer.finish(tokenizer_from)
