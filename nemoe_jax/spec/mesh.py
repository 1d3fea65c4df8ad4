"""Device meshes: their axes, and how they are written on the command line."""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from nemoe_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp", "expert")


def _product(mesh_shape: Mapping[str, int], names: Iterable[str]) -> str:
    return " × ".join(f"{name} {mesh_shape[name]}" for name in names)


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
            raise UserError(f"mesh {text!r}: expected a positive size for axis {name}, got {size!r}")
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of those sizes over all devices (or those given), neighbors in it as near as the hardware has them.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    wanted = math.prod(sizes.values())
    if wanted != len(devices):
        there = f"{len(devices)} ({devices[0].platform})"
        raise UserError(f"mesh {_product(sizes, sizes)} wants {wanted} devices; there are {there}")
    shape, names, types = tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(shape, names, devices=devices, axis_types=types)
    except NotImplementedError:  # an axis that is no whole number of the slice's physical axes
        order = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(order, names, axis_types=types)


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Makes a mesh the ambient one; None changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def spans_devices(mesh: AbstractMesh) -> bool:
    """Whether there is an ambient mesh of more than one device."""
    return not mesh.empty and mesh.size > 1


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


def sequence_axes(mesh_shape: Mapping[str, int], length: int) -> tuple[str, ...]:
    """The mesh axes that the tokens of a row are cut over: `sequence`, where it divides their number."""
    size = mesh_shape.get("sequence", 1)
    return ("sequence",) if size > 1 and length % size == 0 else ()


def axes_size(axes: tuple[str, ...]) -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in axes)
