"""Low-rank adapters (LoRA, Hu et al. 2021), derived from the schema.

A weight's adapter has A: stacked axes + inputs + rank, and B: stacked axes + rank + outputs, so that every layer and
every expert has its own, and adds `scale · (x @ A) @ B` to `x @ W` (layers.py does). Adapters are a tree of their own
with the schema's paths; gradients over that tree leave the base alone.

    targets = [Target("blocks/*/attn/*", rank=16, alpha=32)]
    initialize(config, targets, key)
    -> {"blocks": {"moe": {"attn": {"q": Adapter(a=(L, D, R), b=(L, R, N, H), scale=2.0), …}}}}

`declare` gives the same tree of ParamSpecs; shapes (`abstract`) and places (`shardings`) derive from it, with no array
made. Dropout (of the adapter's input, in training alone) happens where an adapter holds a key: see `with_dropout`.

L layers, D embed, N heads, H head_dim, R rank.
"""

import dataclasses
import fnmatch
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from nemoe_jax.errors import UserError
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.first_values import first_values
from nemoe_jax.spec.fp8_weight import Fp8Weight
from nemoe_jax.spec.schema import ParamSpec, Tree, leaves, map_with_path, unflatten
from nemoe_jax.spec.sharding import RULES, Rules, partition_spec


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b", "key"], meta_fields=["scale", "dropout"])
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank update of one weight, or what was derived from it: ParamSpecs, shapes, shardings, gradients."""

    a: Any
    b: Any
    scale: float
    dropout: float = 0.0  # share of the adapter's inputs that are dropped where there is a key
    key: Any = None  # RNG key, one for each layer; None outside training


@dataclasses.dataclass(frozen=True)
class Target:
    """Which weights get adapters: a glob over the schema's paths; rank, alpha and dropout of the adapters."""

    pattern: str
    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / √rank where rank-stabilized (Kalajdzievski 2023, arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def factors(spec: ParamSpec, rank: int) -> tuple[ParamSpec, ParamSpec]:
    """The specs of A and B of one weight's adapter: the weight's axes, and "rank"."""
    begin, end = len(spec.stacked), len(spec.stacked) + len(spec.contracted)
    stacked, inputs, outputs = spec.shape[:begin], spec.shape[begin:end], spec.shape[end:]
    std = math.prod(inputs) ** -0.5
    return (
        dataclasses.replace(spec, produced=("rank",), shape=(*stacked, *inputs, rank), std=std),
        dataclasses.replace(spec, contracted=("rank",), shape=(*stacked, rank, *outputs), std=0.0),
    )


def match(config: ModelConfig, targets: Sequence[Target]) -> dict[str, tuple[ParamSpec, Target]]:
    """{path: (spec, target)} of the weights to adapt; the first target that matches a path wins.

    Raises:
        UserError: a target matches no linear map, has a rank above a matched weight's smaller dimension, or a rank,
            alpha or dropout out of range.
    """
    specs = {path: spec for path, spec in leaves(schema.declare(config)).items() if spec.contracted}
    chosen: dict[str, tuple[ParamSpec, Target]] = {}
    for target in targets:
        if target.rank < 1 or not 0 < target.alpha < math.inf:
            raise UserError(f"LoRA target {target.pattern}: expected a positive rank and alpha, got {target}")
        if not 0 <= target.dropout < 1:
            raise UserError(f"LoRA target {target.pattern}: dropout: expected 0 to below 1, got {target.dropout}")
        matching = fnmatch.filter(specs, target.pattern)
        if not matching:
            raise UserError(f"LoRA target {target.pattern} matches no weight; the weights are: {', '.join(specs)}")
        for path in matching:
            chosen.setdefault(path, (specs[path], target))
    for path, (spec, target) in chosen.items():
        if target.rank > min(spec.matrix_shape):
            raise UserError(
                f"LoRA target {target.pattern}: rank {target.rank} is above {min(spec.matrix_shape)}, the smaller "
                f"dimension of {path} {spec.matrix_shape}; give {path} a target of its own, before this one"
            )
    return chosen


def declare(config: ModelConfig, targets: Sequence[Target]) -> Tree:
    """The adapters' tree with a ParamSpec for each A and B.

    The adapter of the embedding has no dropout (nor has PEFT's): a look-up has no input to drop from.

    Raises:
        UserError: see `match`.
    """

    def adapter(spec: ParamSpec, target: Target) -> Adapter:
        return Adapter(*factors(spec, target.rank), target.scale, 0.0 if spec.lookup else target.dropout)

    return unflatten({path: adapter(spec, target) for path, (spec, target) in match(config, targets).items()})


def abstract(config: ModelConfig, targets: Sequence[Target]) -> Tree:
    """The adapters' shapes and dtype (float32), with no array made."""
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), declare(config, targets))


def shardings(config: ModelConfig, targets: Sequence[Target], mesh: Mesh | None, rules: Rules = RULES) -> Tree:
    """Where A and B live: each axis as in the adapted weight, the rank whole; without a mesh, the first device.

    Raises:
        UserError: see `match` and `sharding.partition_spec`.
    """

    def place(spec: ParamSpec) -> Any:
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(mesh, partition_spec(spec, mesh.shape, rules))

    return jax.tree.map(place, declare(config, targets))


def initialize(config: ModelConfig, targets: Sequence[Target], key: jax.Array, placed: Tree | None = None) -> Tree:
    """Fresh adapters, float32: A normal with standard deviation in^-1/2, B zero, so that nothing changes at first.

    Each array is made where it lives (`placed`: from `shardings`); its values depend on the key and its path alone.
    """
    places = leaves(placed) if placed else {}

    def make(path: str, adapter: Adapter) -> Adapter:
        place = places.get(path, Adapter(None, None, adapter.scale))
        a = first_values(_fold_in(key, path), adapter.a.shape, adapter.a.std, jnp.float32, place.a)
        b = first_values(key, adapter.b.shape, 0.0, jnp.float32, place.b)
        return dataclasses.replace(adapter, a=a, b=b)

    return map_with_path(make, declare(config, targets))


def _fold_in(key: jax.Array, path: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def with_dropout(adapters: Tree, key: jax.Array) -> Tree:
    """The adapters with a key in each that has a dropout rate: one for each layer, different for each path.

    Differentiate with respect to the adapters without keys, and add the keys inside of the differentiated function.
    """

    def add(path: str, adapter: Adapter) -> Adapter:
        if not adapter.dropout:
            return adapter
        own = _fold_in(key, path)
        stacked = path.startswith("blocks/")
        return dataclasses.replace(adapter, key=jax.random.split(own, adapter.a.shape[0]) if stacked else own)

    return map_with_path(add, adapters)


def keys_by_device(adapters: Tree, mesh_axes: Sequence[str]) -> Tree:
    """Inside of a shard_map: the adapters with keys that differ between devices along those mesh axes."""

    def fold(adapter: Adapter) -> Adapter:
        key = jax.random.fold_in(adapter.key, jax.lax.axis_index(tuple(mesh_axes)))
        return dataclasses.replace(adapter, key=key)

    return map_with_path(
        lambda _, adapter: fold(adapter) if mesh_axes and adapter.key is not None else adapter, adapters
    )


def dropped(x: jax.Array, adapter: Adapter) -> jax.Array:
    """The adapter's input: x, or in training x with a share of its elements zero and the others scaled up for it."""
    if adapter.key is None:
        return x
    kept = jax.random.bernoulli(adapter.key, 1 - adapter.dropout, x.shape)
    return jnp.where(kept, x / (1 - adapter.dropout), 0)


def merge(config: ModelConfig, params: Tree, adapters: Tree) -> Tree:
    """W + scale · A @ B for every adapted weight, in W's dtype and place; the sum is formed in float32.

    Weights in FP8 are dequantized for it, and stay so, in the dtype of the embedding.
    """
    specs = leaves(schema.declare(config))
    flat = leaves(params)
    for path, adapter in leaves(adapters).items():
        if isinstance(flat[path], Fp8Weight):
            flat[path] = flat[path].dequantized(flat["embed"].dtype, len(specs[path].stacked))
        sharding = getattr(flat[path], "sharding", None)
        place = sharding if isinstance(sharding, NamedSharding) else None
        flat[path] = _merge_into(len(specs[path].stacked), place)(flat[path], adapter)
    return unflatten(flat)


@functools.lru_cache(maxsize=128)
def _merge_into(stacked: int, place: NamedSharding | None) -> Any:
    return jax.jit(functools.partial(_merged, stacked), out_shardings=place)


def _merged(stacked: int, weight: jax.Array, adapter: Adapter) -> jax.Array:
    rank = adapter.b.shape[stacked]
    lead = weight.shape[:stacked]
    a = adapter.a.reshape(*lead, -1, rank)
    b = adapter.b.reshape(*lead, rank, -1)
    update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(weight.shape)
    return (weight.astype(jnp.float32) + np.float32(adapter.scale) * update).astype(weight.dtype)
