"""Meshes, and the rules that lay logical axes onto them.

A mesh has up to four axes: `data` (replicas of the weights), `fsdp` (weights cut along embed, gathered when used),
`expert` (each device owns some experts; the other weights are cut along embed over it too) and `tensor` (heads and
neurons). The batch is cut over data, fsdp and expert.

A rule maps a logical axis of the schema to mesh axes. `"experts.embed"` is the embed axis of an array stacked over
experts and wins over `"embed"`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nemoe_jax.config import ModelConfig
from nemoe_jax.errors import UserError
from nemoe_jax.schema import ParamSpec, Tree, declare

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

Rules = Mapping[str, tuple[str, ...]]
RULES: Rules = {
    "vocab": ("tensor",),
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "experts.experts": ("expert",),  # the router's column for each expert lies everywhere
    "experts.embed": ("fsdp",),
    "expert_ffn": ("tensor",),
    "shared_ffn": ("tensor",),
}


def parse_mesh(text: str) -> dict[str, int]:
    """`"fsdp=4,expert=2"` -> {"fsdp": 4, "expert": 2}.

    Raises:
        UserError: an unknown or repeated axis, or a size that is no positive number.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in MESH_AXES:
            raise UserError(f"mesh {text!r}: unknown axis {name!r}; the axes are {', '.join(MESH_AXES)}")
        if name in sizes:
            raise UserError(f"mesh {text!r}: axis {name} is named twice")
        if not size.isdecimal() or int(size) < 1:
            raise UserError(f"mesh {text!r}: wanted a positive size for axis {name}, got {size!r}")
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of those sizes over all devices (or those given).

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    wanted = int(np.prod(list(sizes.values())))
    if wanted != len(devices):
        shape = " × ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"mesh {shape} wants {wanted} devices; there are {len(devices)} ({devices[0].platform})")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices, axis_types=(AxisType.Auto,) * len(sizes))


def partition_spec(spec: ParamSpec, mesh_shape: Mapping[str, int], rules: Rules = RULES) -> PartitionSpec:
    """Where each axis of an array lies on a mesh of that shape.

    Raises:
        UserError: two axes of the array on one mesh axis, or a size that the mesh does not divide.
    """
    entries: list[tuple[str, ...] | None] = []
    owner: dict[str, str] = {}
    for axis, size in zip(spec.axes, spec.shape, strict=True):
        qualified = f"experts.{axis}" if "experts" in spec.stacked else axis
        mesh_axes = tuple(name for name in rules.get(qualified, rules.get(axis, ())) if mesh_shape.get(name, 1) > 1)
        for name in mesh_axes:
            if name in owner:
                raise UserError(f"{spec.path}: axes {owner[name]} and {axis} are both mapped to mesh axis {name}")
            owner[name] = axis
        parts = int(np.prod([mesh_shape[name] for name in mesh_axes]))
        if size % parts:
            raise UserError(
                f"{spec.path}: axis {axis} of size {size} does not divide over mesh axis "
                f"{' × '.join(mesh_axes)} of size {parts}"
            )
        entries.append(mesh_axes or None)
    return PartitionSpec(*entries)


def shardings(config: ModelConfig, mesh: Mesh | None, rules: Rules = RULES) -> Tree:
    """A sharding for each array of the model; without a mesh, the first device."""
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda spec: device, declare(config))
    return jax.tree.map(lambda spec: NamedSharding(mesh, partition_spec(spec, mesh.shape, rules)), declare(config))


def batch_axes(mesh_shape: Mapping[str, int], batch: int) -> tuple[str, ...]:
    """The mesh axes that a batch is cut over: as many of data, fsdp and expert as divide it."""
    chosen: tuple[str, ...] = ()
    parts = 1
    for name in BATCH_AXES:
        size = mesh_shape.get(name, 1)
        if size > 1 and batch % (parts * size) == 0:
            chosen += (name,)
            parts *= size
    return chosen


def constrain_batch(array: jax.Array) -> jax.Array:
    """Lays axis 0 over the batch axes of the ambient mesh (`jax.set_mesh`); does nothing without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return array
    axes = batch_axes(mesh.shape, array.shape[0])
    return jax.lax.with_sharding_constraint(array, PartitionSpec(axes or None, *[None] * (array.ndim - 1)))
