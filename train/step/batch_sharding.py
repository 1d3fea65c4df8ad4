"""Batches on the devices that compute them.

The rows of a batch are cut over the data, fsdp and expert axes, the tokens of a row over the sequence axis. A process
reads no other rows than its own devices need.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemoe_jax.spec.mesh import batch_axes
from train.recipe import Data


def batch_sharding(rows: int, parts: int, mesh: Mesh) -> NamedSharding:
    """Where the arrays (rows, T) of a batch lie that is computed in `parts` parts."""
    axes = batch_axes(mesh.shape, rows // parts)
    return NamedSharding(mesh, PartitionSpec(axes or None, "sequence" if mesh.shape.get("sequence", 1) > 1 else None))


def local_rows(data: Data, mesh: Mesh | None) -> list[int]:
    """The rows of a step's batch that this process's devices hold parts of."""
    if mesh is None:
        return list(range(data.batch_size))
    shape = (data.batch_size, data.sequence_length)
    sharding = batch_sharding(data.batch_size, data.gradient_accumulation_steps, mesh)
    held = sharding.addressable_devices_indices_map(shape)
    return sorted({row for index in held.values() if index for row in range(*index[0].indices(data.batch_size))})


def shard_batch(batch: Any, rows: Sequence[int], data: Data, mesh: Mesh | None) -> Any:
    """A step's batch, of which the rows `rows` are at hand, on the devices."""
    return _place(batch, rows, data.batch_size, data.gradient_accumulation_steps, mesh)


def place_whole(batch: Any, mesh: Mesh | None) -> Any:
    """A batch that every process has at hand, on the devices."""
    return _place(batch, range(len(batch.inputs)), len(batch.inputs), 1, mesh)


def _place(batch: Any, rows: Sequence[int], total: int, parts: int, mesh: Mesh | None) -> Any:
    if mesh is None:
        return type(batch)(*map(jax.device_put, batch))
    of_tokens, at = batch_sharding(total, parts, mesh), {row: number for number, row in enumerate(rows)}
    of_rows = NamedSharding(mesh, PartitionSpec(of_tokens.spec[0]))

    def put(array: np.ndarray) -> jax.Array:
        sharding = of_tokens if array.shape[1:2] == batch.inputs.shape[1:] else of_rows

        def piece(index: Any) -> np.ndarray:
            return array[[at[row] for row in range(*index[0].indices(total))]][:, *index[1:]]

        return jax.make_array_from_callback((total, *array.shape[1:]), sharding, piece)

    return type(batch)(*map(put, batch))
