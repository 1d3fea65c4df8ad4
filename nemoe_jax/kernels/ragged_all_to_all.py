"""Rows that devices along a mesh axis send one another, as many as they like to each: a ragged all-to-all.

Inside of a shard_map. Every device knows how many rows go from where to where; a device's rows lie in the order of
the devices that they go to, and arrive in the order of those that they come from.

TPUs and GPUs have the operation. For CPUs a stand-in of the same contract gathers all devices' rows and picks.

R rows, S rows there is room for where they arrive, P devices (first the sender), D width.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def ragged_all_to_all(rows_RD: jax.Array, sizes_PP: jax.Array, room: int, axis: str) -> jax.Array:
    """The rows that arrive, (S, D); what lies behind the last of them is not defined.

    Its gradient is the exchange back. So is `exchange(rows_SD, sizes_PP.T, R, axis)`.

    Args:
        rows_RD: the rows to send, those to the first device first; what lies behind the last is sent nowhere.
        sizes_PP: int32; how many rows each device (first axis) sends to each (second axis); the same on all of them.
        room: S; at least as many as arrive.
        axis: name of the mesh axis.
    """
    me = lax.axis_index(axis)
    starts_PP = jnp.cumsum(sizes_PP, axis=1) - sizes_PP  # where the sender's rows to a device begin
    places_PP = jnp.cumsum(sizes_PP, axis=0) - sizes_PP  # where they go on that device
    return lax.platform_dependent(
        rows_RD,
        lax.empty((room, *rows_RD.shape[1:]), rows_RD.dtype),
        starts_PP[me],
        sizes_PP[me],
        places_PP[me],
        sizes_PP[:, me],
        cpu=functools.partial(gather_and_pick, axis_name=axis),
        default=functools.partial(lax.ragged_all_to_all, axis_name=axis),
    )


ragged_all_to_all.defvjp(
    lambda rows_RD, sizes_PP, room, axis: (
        ragged_all_to_all(rows_RD, sizes_PP, room, axis),
        (sizes_PP, rows_RD.shape[0]),
    ),
    lambda room, axis, kept, dy_SD: (ragged_all_to_all(dy_SD, kept[0].T, kept[1], axis), None),
)


def gather_and_pick(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """What `jax.lax.ragged_all_to_all` gives for the same arguments, by an all-gather of every device's rows."""
    del send_sizes  # the receivers know
    starts_PP, places_PP, rows_PRD = lax.all_gather((input_offsets, output_offsets, operand), axis_name)
    me = lax.axis_index(axis_name)
    row_S1 = jnp.arange(output.shape[0])[:, None]
    from_SP = (row_S1 >= places_PP[:, me]) & (row_S1 < places_PP[:, me] + recv_sizes)
    sender_S = jnp.argmax(from_SP, axis=1)
    picked = rows_PRD[sender_S, row_S1[:, 0] - places_PP[sender_S, me] + starts_PP[sender_S, me]]
    return jnp.where(from_SP.any(axis=1).reshape(-1, *[1] * (output.ndim - 1)), picked, output)
