"""Meshes, and the rules that lay logical axes onto them.

A mesh has up to five axes: `data` (replicas of the weights), `fsdp` (each device holds a part of the weights, gathered
when used), `expert` (each device owns some experts), `tensor` (heads and neurons) and `sequence` (the tokens of a row).
The batch is cut over data, fsdp and expert, its rows over sequence; all weights are cut over fsdp, expert and sequence
together, so that no frozen weight lies anywhere twice but along data.

A rule maps a logical axis of the schema to the mesh axes that may cut it. `"experts.embed"` is the embed axis of an
array stacked over experts and wins over `"embed"`. A mesh axis cuts the first of an array's axes that it divides: that
is the experts' where there are some, or else what is contracted, so that a gather puts whole blocks of memory behind
one another.

B batch, T sequence.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.mesh import BATCH_AXES, _product, batch_axes, sequence_axes
from nemoe_jax.spec.schema import ParamSpec, Tree, declare, leaves

# what lies cut over these is gathered when used, experts over expert excepted
SPREAD_AXES = ("expert", "fsdp", "sequence")

Rules = Mapping[str, tuple[str, ...]]
RULES: Rules = {
    "vocab": ("tensor",),
    "embed": SPREAD_AXES,
    "heads": ("tensor", *SPREAD_AXES),
    "kv_heads": ("tensor", *SPREAD_AXES),
    "head_dim": ("tensor", *SPREAD_AXES),  # where there are fewer heads than devices
    "ffn": ("tensor", *SPREAD_AXES),
    "shared_ffn": ("tensor", *SPREAD_AXES),
    "experts.experts": SPREAD_AXES,  # the router's column for each expert lies everywhere
    "experts.embed": ("fsdp", "sequence"),
    "expert_ffn": ("tensor", "fsdp", "sequence"),
}


def partition_spec(spec: ParamSpec, mesh_shape: Mapping[str, int], rules: Rules = RULES) -> PartitionSpec:
    """Where each axis of an array lies on a mesh of that shape; what is no linear map (a norm) lies whole everywhere.

    Raises:
        UserError: a mesh axis that divides none of the array's axes. The low-rank factors of an adapter are left whole.
    """
    cuts: list[tuple[str, ...]] = [()] * len(spec.axes)
    left = list(spec.shape)
    refused: dict[str, list[str]] = {}  # mesh axis: what it does not divide
    placed: set[str] = set()
    for number, axis in enumerate(spec.axes if spec.contracted else ()):
        qualified = f"experts.{axis}" if "experts" in spec.stacked else axis
        for name in rules.get(qualified, rules.get(axis, ())):
            size = mesh_shape.get(name, 1)
            if size == 1 or name in placed:
                continue
            if left[number] % size:
                refused.setdefault(name, []).append(f"axis {axis} of size {left[number]}")
                continue
            placed.add(name)
            cuts[number] += (name,)
            left[number] //= size
    for name in refused:
        if name not in placed and "rank" not in spec.axes:
            raise UserError(
                f"{spec.path}: mesh axis {name} of size {mesh_shape[name]} does not divide {' or '.join(refused[name])}"
            )
    return PartitionSpec(*(names or None for names in cuts))


def fp8_scale_spec(spec: ParamSpec, values: PartitionSpec, blocks: int) -> PartitionSpec:
    """How the scales (stacked…, blocks, outputs…) of FP8 weights lie that lie so.

    Blocks of experts' weights are cut with them, since each device multiplies its own part; others are whole.
    """
    stacked, inputs = len(spec.stacked), len(spec.contracted)
    of_blocks = values[stacked] if blocks > 1 and "experts" in spec.stacked else None
    return PartitionSpec(*values[:stacked], of_blocks, *values[stacked + inputs :])


def used_spec(spec: ParamSpec, stored: PartitionSpec) -> PartitionSpec:
    """How an array lies while it is used: by expert, by head and by neuron, whole along everything else."""
    owner = {"heads": "tensor", "kv_heads": "tensor", "ffn": "tensor", "shared_ffn": "tensor", "expert_ffn": "tensor"}
    owner |= {"vocab": "tensor", "experts": "expert"}
    entries = zip(spec.axes, stored, strict=True)
    return PartitionSpec(*(owner[axis] if owner.get(axis) in axes_of(entry) else None for axis, entry in entries))


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of a PartitionSpec's entry, which gives a single one as a bare string."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(array: jax.Array, stored: PartitionSpec, used: PartitionSpec) -> jax.Array:
    """An array as it is used, gathered here and now; its gradient is summed straight to where the array is stored."""
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(array, stored), used)


gathered.defvjp(
    lambda array, stored, used: (gathered(array, stored, used), None),
    lambda stored, used, _, gradient: (jax.lax.with_sharding_constraint(gradient, stored),),
)


def compiler_options(platform: str) -> dict[str, str]:
    """What the compiler is told so that gathering weights goes on beside other work, for `jax.jit`.

    A TPU's compiler carries a gather on inside of what is computed meanwhile: by default inside of matrix products
    alone, of which there are fewer than gathers. With this, inside of what goes element by element as well.

    Args:
        platform: of the devices, as `jax.Device.platform`.
    """
    return {"xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": "true"} if platform == "tpu" else {}


def check(config: ModelConfig, mesh_shape: Mapping[str, int], batch: int, sequence_length: int) -> None:
    """Whether a model can be trained on a mesh of that shape, with `batch` rows of `sequence_length` tokens at a time.

    Raises:
        UserError: one line with every mesh axis (or product of some) that does not divide what it is to cut.
    """
    problems: list[str] = []
    for name, size in mesh_shape.items():
        found = []
        for spec in leaves(declare(config)).values():
            try:
                partition_spec(spec, {name: size})
            except UserError as error:
                found.append(str(error))
        if found:
            more = f" (nor those of {len(found) - 1} more weights)" if len(found) > 1 else ""
            problems.append(found[0] + more)
    cut_rows = [name for name in BATCH_AXES if mesh_shape.get(name, 1) > 1]
    for what, size, names in (
        ("batch", batch, cut_rows),
        ("sequence_length", sequence_length, ["sequence"]),
        ("heads", config.heads, ["tensor", "sequence"]),
    ):
        names = [name for name in names if mesh_shape.get(name, 1) > 1]
        if size % math.prod(mesh_shape[name] for name in names):
            problems.append(f"mesh {_product(mesh_shape, names)} does not divide {what} of {size}")
    if problems:
        raise UserError("; ".join(problems))


def shardings(config: ModelConfig, mesh: Mesh | None, rules: Rules = RULES) -> Tree:
    """A sharding for each array of the model; without a mesh, the first device."""
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda spec: device, declare(config))
    return jax.tree.map(lambda spec: NamedSharding(mesh, partition_spec(spec, mesh.shape, rules)), declare(config))


def constrain_tokens(array: jax.Array) -> jax.Array:
    """Lays (B, T, …) over the ambient mesh (`jax.set_mesh`), rows and tokens; does nothing without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return array
    rows, tokens = batch_axes(mesh.shape, array.shape[0]), sequence_axes(mesh.shape, array.shape[1])
    return jax.lax.with_sharding_constraint(array, PartitionSpec(rows or None, tokens or None))


def on_host(array: Any) -> np.ndarray:
    """The whole of an array, gathered from all processes where they hold it together: then each of them must ask."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
