"""Looking up the embeddings of tokens in a table that is cut over the ambient mesh.

Each device looks up its own columns for all tokens, then columns are exchanged for tokens: what goes over the wires is
the activations once, and never the table.

B batch, T sequence, V vocabulary, D embed, R rank.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from nemoe_jax.adapters.lora import Adapter, factors
from nemoe_jax.adapters.multi_lora import StackedAdapter, mask_ranks
from nemoe_jax.spec.mesh import batch_axes, sequence_axes, spans_devices
from nemoe_jax.spec.schema import ParamSpec
from nemoe_jax.spec.sharding import axes_of, partition_spec


def embed_tokens(spec: ParamSpec, table_VD: jax.Array, tokens_BT: jax.Array, adapter: Adapter | None) -> jax.Array:
    """(V, D), int32 (B, T) -> (B, T, D), with the adapter's `scale · A[token] @ B` added."""
    mesh = jax.sharding.get_abstract_mesh()
    if not spans_devices(mesh):
        return _rows(table_VD, tokens_BT, adapter, 0)
    rows, tokens = batch_axes(mesh.shape, tokens_BT.shape[0]), sequence_axes(mesh.shape, tokens_BT.shape[1])
    place = partition_spec(spec, mesh.shape)
    columns = axes_of(place[1])
    cut_words = bool(axes_of(place[0]))  # over tensor
    copies = [name for name in rows if name not in columns]  # data: the rows of each copy are its own

    def on_device(table_VD: jax.Array, tokens_BT: jax.Array, adapter: Adapter | None) -> jax.Array:
        first = lax.axis_index("tensor") * table_VD.shape[0] if cut_words else 0
        x_BTD = _rows(table_VD, tokens_BT, adapter, first)
        if cut_words:
            x_BTD = lax.psum(x_BTD, "tensor")
        for name in reversed(columns):
            if name in rows or name in tokens:
                x_BTD = lax.all_to_all(x_BTD, name, 0 if name in rows else 1, 2, tiled=True)
            else:
                x_BTD = lax.all_gather(x_BTD, name, axis=2, tiled=True)
        return x_BTD

    of_rows = PartitionSpec(tuple(copies) or None)
    place_adapter = None
    if adapter is not None:
        a, b = (partition_spec(factor, mesh.shape) for factor in factors(spec, adapter.a.shape[-1]))
        place_adapter = dataclasses.replace(adapter, a=a, b=b)
        if isinstance(place_adapter, StackedAdapter):
            place_adapter = dataclasses.replace(place_adapter, index=of_rows)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(place, of_rows, place_adapter),
        out_specs=PartitionSpec(rows or None, tokens or None),
        check_vma=False,
    )(table_VD, tokens_BT, adapter)


def _rows(table_VD: jax.Array, tokens_BT: jax.Array, adapter: Adapter | None, first: int | jax.Array) -> jax.Array:
    """The rows of a table that holds the words from `first` on; zeros for words that it does not hold."""
    index_BT = tokens_BT - first
    held_BT1 = ((index_BT >= 0) & (index_BT < table_VD.shape[0]))[..., None]
    x_BTD = jnp.where(held_BT1, table_VD[index_BT], 0)
    if adapter is not None:
        low_rank_BTR = jnp.where(held_BT1, adapter.scale * adapter.a[index_BT], 0)
        x_BTD += (mask_ranks(low_rank_BTR, adapter) @ adapter.b).astype(x_BTD.dtype)
    return x_BTD
