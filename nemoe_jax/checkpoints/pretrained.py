"""Hugging Face model directories as sharded parameters, and back.

Loading asks each leaf of the schema for its slices: every device's shard is filled straight from the mapped file, and
no sharded leaf is whole on the host. Saving goes layer by layer.
"""

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemoe_jax.checkpoints.reader import Checkpoint, units
from nemoe_jax.checkpoints.writer import SHARD_BYTES, Writer
from nemoe_jax.spec import sharding
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.fp8_weight import Fp8Weight, Quantization, is_quantized, nf4_block, scale_shape, to_nf4
from nemoe_jax.spec.schema import ParamSpec, Tree, declare, leaves, unflatten
from nemoe_jax.utils.progress import progress_bar

SMALL = 2**20  # bytes of an array that is not cut on its devices


def load_pretrained(
    source: str | Path | Checkpoint,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    rules: sharding.Rules = sharding.RULES,
    progress: bool = False,
    quantization: Quantization | None = None,
) -> tuple[ModelConfig, Tree]:
    """Config and parameters of a model directory, each array on its devices (without a mesh: the first one).

    Args:
        source: a model directory or a GGUF file; or one that is open already.
        dtype: dtype of the arrays; the config's own by default. "fp8" and "nf4" are that with `quantization`.
        progress: show a progress bar on a terminal.
        quantization: what linear maps are kept in, each an `Fp8Weight`, and rounded to where they are not so on disk;
            by default those that are in FP8 there, unless `dtype` is given.

    Raises:
        UserError: see `Checkpoint`; or the mesh does not fit the model.
    """
    if dtype in ("fp8", "nf4"):
        dtype, quantization = None, dtype
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    placed = leaves(sharding.shardings(checkpoint.config, mesh, rules))

    def quantization_of(spec: ParamSpec) -> Quantization | None:
        if not is_quantized(spec):
            return None
        return quantization or ("fp8" if dtype is None and checkpoint.keeps_fp8(spec) else None)

    params: dict[str, Any] = {}
    with progress_bar(visible=progress) as bar:
        specs = leaves(declare(checkpoint.config))
        for path, spec in bar.track(specs.items(), description=f"loading {checkpoint.path.name}"):
            kept = quantization_of(spec)
            if kept == "fp8":
                params[path] = _load_fp8(checkpoint, spec, placed[path])
            elif kept == "nf4":
                params[path] = _load_nf4(checkpoint, spec, placed[path])
            else:
                read = functools.partial(checkpoint.read, spec, dtype=jnp.dtype(dtype or checkpoint.config.dtype))
                params[path] = _placed(spec.shape, placed[path], read)
    return checkpoint.config, unflatten(params)


def _load_fp8(checkpoint: Checkpoint, spec: ParamSpec, place: jax.sharding.Sharding) -> Fp8Weight:
    stacked = len(spec.stacked)
    most = spec.matrix_shape[0]  # inputs of a block
    if isinstance(place, NamedSharding):
        cut = place.shard_shape(spec.shape)[stacked]
        most = cut if "experts" in spec.stacked else most
    blocks = checkpoint.read_scales(spec, tuple(slice(0, 1) for _ in spec.stacked), most).shape[stacked]
    of_scales = of_cache = place
    if isinstance(place, NamedSharding):
        of_scales = NamedSharding(place.mesh, sharding.fp8_scale_spec(spec, place.spec, blocks))
        of_cache = NamedSharding(place.mesh, PartitionSpec())
    cache = checkpoint.read_cache_scales(spec)
    devices: list[Any] = list(place.addressable_devices)
    as_bits = devices[0].platform == "cpu"

    def read_values(index: tuple[slice, ...]) -> np.ndarray:
        values = checkpoint.read_fp8(spec, index)
        return values.view(np.uint8) if as_bits else values

    return Fp8Weight(
        _placed(spec.shape, place, read_values),
        _placed(scale_shape(spec, blocks), of_scales, functools.partial(checkpoint.read_scales, spec, most=most)),
        None if cache is None else jax.device_put(cache, of_cache),
    )


def _load_nf4(checkpoint: Checkpoint, spec: ParamSpec, place: jax.sharding.Sharding) -> Fp8Weight:
    stacked, block = len(spec.stacked), nf4_block(spec, place)
    shape = scale_shape(spec, spec.matrix_shape[0] // block)
    whole = tuple(slice(0, size) for size in spec.shape)

    def read(index: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
        w = checkpoint.read(spec, index, np.float32)
        inputs = math.prod(w.shape[stacked : stacked + len(spec.contracted)])
        with jax.default_device(jax.local_devices(backend="cpu")[0]):  # layer by layer: what is wide is small
            layers = [to_nf4(layer.reshape(*layer.shape[: stacked - 1], inputs, -1), block) for layer in w]
            codes, scales = (np.stack([np.asarray(part) for part in parts]) for parts in zip(*layers, strict=True))
        return codes.reshape(w.shape), scales.reshape(
            *scales.shape[: stacked + 1], *w.shape[stacked + len(spec.contracted) :]
        )

    def read_scales(index: tuple[slice, ...]) -> np.ndarray:
        blocks = index[stacked]
        inputs = whole[stacked : stacked + len(spec.contracted)]
        if len(inputs) == 1:
            inputs = (slice(blocks.start * block, blocks.stop * block),)
        return read((*index[:stacked], *inputs, *index[stacked + 1 :]))[1]

    of_scales = place
    if isinstance(place, NamedSharding):
        of_scales = NamedSharding(place.mesh, sharding.fp8_scale_spec(spec, place.spec, shape[stacked]))
    return Fp8Weight(_placed(spec.shape, place, lambda index: read(index)[0]), _placed(shape, of_scales, read_scales))


def _placed(
    shape: tuple[int, ...], place: jax.sharding.Sharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array whose parts are read once each and put on their devices."""
    devices_of: dict[Any, list[jax.Device]] = {}  # replicas share one read
    indices = place.addressable_devices_indices_map(shape)
    for device, index in indices.items():
        assert index is not None  # every addressable device holds a part
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        devices_of.setdefault(key, []).append(device)
    shards: dict[jax.Device, jax.Array] = {}
    for key, devices in devices_of.items():
        block = read(tuple(slice(*part) for part in key))
        shards |= {device: jax.device_put(block, device, may_alias=True) for device in devices}
    return jax.make_array_from_single_device_arrays(shape, place, [shards[device] for device in indices])


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
            array = flat[path]
            if isinstance(array, Fp8Weight):  # (its layers are all that is stacked before the experts)
                array = array.at(group[0].place[0]).dequantized(jnp.float32, stacked=len(group[0].spec.stacked) - 1)
            elif layered:  # cut on the host where that is little to move: each cut is a program of its own
                small = array.nbytes <= SMALL
                array = (sharding.on_host(array) if small else array)[group[0].place[0]]
            array = sharding.on_host(array)
            for ref in group:
                tensors[ref.key] = ref.spec.to_torch(array[ref.place[1:]] if layered else array)
        return tensors

    with Writer(directory, config, shard_bytes) as writer:
        for unit in range(len(by_unit)):
            tensors = produce(unit)
            if unit % jax.process_count() == jax.process_index():
                writer.write(unit, tensors)
        writer.finish(tokenizer_from)
