"""Experts over a mesh: each device runs those that it owns, for the tokens of all devices along the `expert` axis.

Two ways to bring tokens and experts together, and a rule that chooses (`exchange_of`):

    gather      every device gathers all tokens of the axis, computes what its experts owe them, and the sums are
                scattered back (reduce-scatter)
    all-to-all  each token's rows, one for each of its choices, go to the owners of the chosen experts, and come back

No token is dropped in either. For the all-to-all a device must have room for all rows there are; tokens are sent in
parts so small that this is no more than `apply_experts` holds at a time anyway.

Where the expert axis does not cut the batch, every device has the tokens already, and the sums are added up.

B batch, T tokens, D embed, E experts, C top-k, P devices along the expert axis, H experts of each, R = T·C rows,
S rows there is room for.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from nemoe_jax.adapters.lora import factors, keys_by_device
from nemoe_jax.kernels.backend import target_platform
from nemoe_jax.kernels.ragged_all_to_all import ragged_all_to_all
from nemoe_jax.model import expert_ffn
from nemoe_jax.model.expert_ffn import apply_experts
from nemoe_jax.model.layers import Adapters
from nemoe_jax.model.token_chunks import map_token_chunks, num_chunks
from nemoe_jax.spec.fp8_weight import Fp8Weight
from nemoe_jax.spec.mesh import batch_axes, sequence_axes
from nemoe_jax.spec.schema import ParamSpec, Tree
from nemoe_jax.spec.sharding import axes_of, fp8_scale_spec, partition_spec, used_spec

Exchange = Literal["gather", "all-to-all"]


class _Tokens(NamedTuple):
    """What goes with the tokens: (B, T, …), or flat."""

    x: jax.Array
    weights: jax.Array
    chosen: jax.Array
    adapter: jax.Array | None  # the number of each one's own, where they are joined


def exchange_of(platform: str, devices: int, top_k: int) -> Exchange:
    """Which way sends less, of those that the backend has.

    With T tokens on each of P devices, a device sends in each direction

        gather      T · (P - 1) rows, whatever is chosen
        all-to-all  T · C · (P - 1) / P rows, where the load is even

    so the all-to-all sends less where P > C. XLA has no ragged all-to-all for CPUs.

    Args:
        platform: of the devices, as `jax.Device.platform`.
        devices: along the expert axis (P).
        top_k: choices of each token (C).
    """
    return "all-to-all" if platform != "cpu" and devices > top_k else "gather"


def run_over_mesh(
    x_BTD: jax.Array,
    weights_BTC: jax.Array,
    chosen_BTC: jax.Array,
    experts: Tree,
    adapters: Adapters,
    specs: Mapping[str, ParamSpec],
    mesh: AbstractMesh,
    index_BT: jax.Array | None = None,
) -> jax.Array:
    """`apply_experts` for all experts, over the mesh: the weighted sums (B, T, D) of the chosen experts' outputs.

    Args:
        experts: one layer's weights of all experts, each array (E, …), as they are stored on the mesh.
        specs: the schema's specs of those weights, stacked over layers.
        index_BT: each token's own among the adapters of a bank, which hold no index themselves.
    """
    sizes = dict(mesh.shape)
    rows, tokens = batch_axes(sizes, x_BTD.shape[0]), sequence_axes(sizes, x_BTD.shape[1])
    # what one device computes is its own along these, and the same along the others
    own = [name for name in sizes if name in (*rows, *tokens, "expert", "tensor")]
    stored: dict[str, Any] = {}
    used: dict[str, Any] = {}
    for name, spec in specs.items():
        stored[name], used[name] = _places(spec, sizes)
        if isinstance(experts[name], Fp8Weight):
            blocks = experts[name].scale.shape[1]
            stored[name], used[name] = (
                Fp8Weight(place, _scales_place(spec, place, blocks)) for place in (stored[name], used[name])
            )
    stored_adapters, used_adapters = {}, {}
    for name, adapter in adapters.items():
        a, b = (_places(factor, sizes) for factor in factors(specs[name], adapter.a.shape[-1]))
        key = None if adapter.key is None else PartitionSpec()
        stored_adapters[name] = dataclasses.replace(adapter, a=a[0], b=b[0], key=key)
        used_adapters[name] = dataclasses.replace(adapter, a=a[1], b=b[1], key=key)
    devices = sizes.get("expert", 1)
    apart = "expert" in rows  # the expert axis cuts the batch too
    run = _run_own
    if apart:
        way = exchange_of(target_platform(), devices, chosen_BTC.shape[-1])
        run = {"gather": _run_by_gather, "all-to-all": _run_by_all_to_all}[way]
    summed = [name for name in ("expert", "tensor") if sizes.get(name, 1) > 1 and not (apart and name == "expert")]

    def on_device(of_tokens, experts, adapters):
        experts = jax.tree.map(_gather, experts, stored, used)
        adapters = keys_by_device(jax.tree.map(_gather, adapters, stored_adapters, used_adapters), own)
        return lax.psum(run(of_tokens, experts, adapters, devices), summed)

    of_tokens = PartitionSpec(rows or None, tokens or None)
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(of_tokens, stored, stored_adapters), out_specs=of_tokens, check_vma=False
    )(_Tokens(x_BTD, weights_BTC, chosen_BTC, index_BT), experts, adapters)


def _run_own(tokens, experts, adapters, devices):
    """What a device's own experts add to the tokens that it has."""
    first = lax.axis_index("expert") * experts["gate"].shape[0] if devices > 1 else 0
    return apply_experts(tokens.x, tokens.weights, tokens.chosen, experts, adapters, first, tokens.adapter)


def _run_by_gather(tokens, experts, adapters, devices):
    tokens = lax.all_gather(tokens, "expert", axis=0, tiled=True)
    y_BTD = _run_own(tokens, experts, adapters, devices)
    return lax.psum_scatter(y_BTD, "expert", scatter_dimension=0, tiled=True)


def _run_by_all_to_all(tokens, experts, adapters, devices):
    shape, tokens = tokens.x.shape, jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), tokens)
    parts = num_chunks(len(tokens.x), max(expert_ffn.AT_ONCE // devices, 1))
    count = devices * experts["gate"].shape[0]
    # how many of each part's rows go from each device to each expert: known to all, for all parts at once
    counts_E = jnp.sum(tokens.chosen.reshape(parts, -1, 1) == jnp.arange(count), axis=1)
    counts_PE = lax.all_gather(counts_E, "expert", axis=1).reshape(-1, count)

    def run(part, adapters):
        tokens, counts_PE = part
        return _exchange_part(tokens, counts_PE, experts, adapters)

    return map_token_chunks(run, (tokens, counts_PE), adapters, parts).reshape(shape)


def _exchange_part(tokens, counts_PE, experts, adapters):
    """Rows sorted by expert, so by owner, too; sent, multiplied, sent back, summed."""
    x_TD, weights_TC, chosen_TC, index_T = tokens
    devices, top_k = len(counts_PE), chosen_TC.shape[1]
    counts_PPH = counts_PE.reshape(devices, devices, -1)
    sizes_PP, rows = counts_PPH.sum(axis=-1), chosen_TC.size
    room = devices * rows  # all rows of all devices
    order_R = jnp.argsort(chosen_TC.reshape(-1))
    token_R, place_TC = order_R // top_k, jnp.argsort(order_R).reshape(-1, top_k)  # where each token's choice went

    x_RD = expert_ffn.dispatch(x_TD, token_R, place_TC, rows)
    weights_R1 = expert_ffn.dispatch(weights_TC.reshape(-1, 1), order_R, place_TC.reshape(-1, 1), rows)
    x_SD, weights_S1 = (ragged_all_to_all(array, sizes_PP, room, "expert") for array in (x_RD, weights_R1))
    index_S = None if index_T is None else ragged_all_to_all(index_T[token_R], sizes_PP, room, "expert")
    y_SD = _run_arrived(_Tokens(x_SD, weights_S1, _own_expert(counts_PPH, room), index_S), experts, adapters)
    y_RD = ragged_all_to_all(y_SD, sizes_PP.T, rows, "expert")
    return expert_ffn.combine(y_RD, token_R, place_TC, rows)


def _run_arrived(rows, experts, adapters):
    """`apply_experts` for rows that arrived, mostly fewer than there is room for; what is behind them may be NaN."""
    held = experts["gate"].shape[0]

    def run(part, adapters):
        x_SD, weights_S1, expert_S, index_S = part
        here_S1 = (expert_S < held)[:, None]

        def multiply():
            x, weights = (jnp.where(here_S1, array, 0)[None] for array in (x_SD, weights_S1))
            y = apply_experts(x, weights, expert_S[None, :, None], experts, adapters, 0, index_S)[0]
            return jnp.where(here_S1, y, 0)

        return lax.cond(expert_S[0] < held, multiply, lambda: jnp.zeros_like(x_SD))

    return map_token_chunks(run, rows, adapters, num_chunks(len(rows.x), expert_ffn.AT_ONCE))


def _own_expert(counts_PPH: jax.Array, room: int) -> jax.Array:
    """Which of the device's experts each arrived row is for, counted from its first; behind the last row, none (H)."""
    held = counts_PPH.shape[-1]
    groups = counts_PPH[:, lax.axis_index("expert")].reshape(-1)  # by sender, then by expert
    group_S = jnp.searchsorted(jnp.cumsum(groups), jnp.arange(room), side="right", method="compare_all")
    return jnp.where(group_S < len(groups), group_S % held, held)


def _places(spec: ParamSpec, mesh_shape: Mapping[str, int]) -> tuple[PartitionSpec, PartitionSpec]:
    """How one layer's part of an array lies (stored, while it is used)."""
    stored = partition_spec(spec, mesh_shape)
    return PartitionSpec(*stored[1:]), PartitionSpec(*used_spec(spec, stored)[1:])


def _scales_place(spec: ParamSpec, place: PartitionSpec, blocks: int) -> PartitionSpec:
    """How one layer's scales of FP8 weights lie that lie so."""
    return PartitionSpec(*fp8_scale_spec(spec, PartitionSpec(None, *place), blocks)[1:])


def _gather(array: jax.Array, stored: PartitionSpec, used: PartitionSpec) -> jax.Array:
    """Inside of a shard_map: the parts that other devices store of what this one uses."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array
    for axis, (cut, kept) in enumerate(zip(stored, used, strict=True)):
        others = tuple(name for name in axes_of(cut) if name != kept)
        if others:
            array = lax.all_gather(array, others, axis=axis, tiled=True)
    return array
