"""What a device's experts add to its tokens: rows sorted by expert, multiplied group by group, and summed back.

No token is dropped. Each row is multiplied by its routing weight at the expert's FFN width, before `down`, where it is
cheapest. Sorting and summing have gradients of their own that gather instead of scattering.

B batch, T tokens, D embed, E experts, C top-k, R = T·C rows, F expert_ffn.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from nemoe_jax.adapters.lora import Adapter, dropped
from nemoe_jax.adapters.multi_lora import StackedAdapter, mask_ranks, with_index
from nemoe_jax.kernels.backend import target_platform
from nemoe_jax.kernels.few_tokens_tpu import are_few_on_tpu, every_expert, padded_rows, sum_of_experts
from nemoe_jax.kernels.fp8 import E4M3
from nemoe_jax.kernels.grouped_matmul.dispatch import Adapted, grouped_lora
from nemoe_jax.kernels.moe_ffn_cpu import TokenOrder, fused_moe_ffn
from nemoe_jax.model.layers import Adapters, project
from nemoe_jax.model.token_chunks import map_token_chunks, num_chunks
from nemoe_jax.spec.fp8_weight import Fp8Weight
from nemoe_jax.spec.schema import Tree

MOST_CHOICES = 16  # that a TPU follows one by one; reading an expert so takes as long as reading three of all
AT_ONCE = 4096  # tokens whose rows are held at a time; more are computed part by part, and again for the gradient


def apply_experts(
    x_BTD: jax.Array,
    weights_BTC: jax.Array,
    chosen_BTC: jax.Array,
    experts: Tree,
    adapters: Adapters,
    first: int | jax.Array,
    index_BT: jax.Array | None = None,
) -> jax.Array:
    """What the experts `first`, `first + 1`, … held in `experts` (each array (E, …)) add to every token, (B, T, D).

    Where the adapters are those of a bank, `index_BT` says which of them is a token's own.
    """
    top_k, width = chosen_BTC.shape[-1], x_BTD.shape[-1]
    of_tokens = x_BTD.reshape(-1, width), weights_BTC.reshape(-1, top_k), chosen_BTC.reshape(-1, top_k) - first
    index_T = None if index_BT is None else index_BT.reshape(-1)

    def run(part, adapters):
        (x_TD, weights_TC, local_TC), index_T = part
        return _run_part(x_TD, weights_TC, local_TC, experts, adapters, index_T)

    parts = num_chunks(len(of_tokens[0]), AT_ONCE)
    return map_token_chunks(run, (of_tokens, index_T), adapters, parts).reshape(x_BTD.shape)


def _run_part(
    x_TD: jax.Array,
    weights_TC: jax.Array,
    local_TC: jax.Array,
    experts: Tree,
    adapters: Adapters,
    index_T: jax.Array | None,
) -> jax.Array:
    """`apply_experts` for tokens whose choices count from the first held expert."""
    held = experts["gate"].shape[0]
    if are_few_on_tpu(len(x_TD)):
        few = 3 * local_TC.size <= min(held, 3 * MOST_CHOICES) and all(one.key is None for one in adapters.values())
        run = _run_choices if few else _run_every_expert  # dropout is drawn for all choices at once
        return run(x_TD, weights_TC, local_TC, experts, with_index(adapters, index_T))
    top_k = local_TC.shape[-1]
    local_R = local_TC.reshape(-1)
    local_R = jnp.where((local_R >= 0) & (local_R < held), local_R, held)  # other devices' rows are sorted last
    order_R = jnp.argsort(local_R)
    sizes_E = jnp.bincount(local_R, length=held + 1)[:held].astype(jnp.int32)
    place_TC = jnp.argsort(order_R).reshape(-1, top_k)  # where each token's choice went
    if target_platform() == "cpu" and use_fused_ffn(x_TD, experts, adapters, local_R.size):
        return fused_moe_ffn(x_TD, weights_TC, experts, adapters, TokenOrder(order_R, place_TC, sizes_E))
    rows = jnp.sum(sizes_E)
    token_R = order_R // top_k
    if index_T is not None:
        adapters = with_index(adapters, index_T[token_R])

    def project_rows(rows_R, *names):
        own = [adapters[name] for name in names if name in adapters]
        alike = all(adapter.key is None and not isinstance(adapter, StackedAdapter) for adapter in own)
        if len(own) == len(names) and alike:
            maps = zip(names, own, strict=True)
            adapted = tuple(Adapted(experts[name], one.a, one.b, one.scale) for name, one in maps)
            return grouped_lora(rows_R, adapted, sizes_E)
        return tuple(project(rows_R, experts[name], 1, adapters.get(name), sizes_E) for name in names)

    x_RD = dispatch(x_TD, token_R, place_TC, rows)
    gate_RF, up_RF = project_rows(x_RD, "gate", "up")
    hidden_RF = jax.nn.silu(gate_RF) * up_RF
    # zero for other devices' rows, so that the weights' gradient does not see what is not defined there
    weights_R1 = _take_rows(weights_TC.reshape(-1, 1), order_R, rows)
    (y_RD,) = project_rows(hidden_RF * weights_R1, "down")
    return combine(y_RD, token_R, place_TC, rows)


def _run_every_expert(
    x_TD: jax.Array, weights_TC: jax.Array, local_TC: jax.Array, experts: Tree, adapters: Adapters
) -> jax.Array:
    """`_run_part` for a few tokens on a TPU: all experts make their part of each token, and few of them weigh."""

    def project_each(name: str, x: jax.Array) -> jax.Array:
        y_TEF, adapter = every_expert(x, experts[name]), adapters.get(name)
        if adapter is None:
            return y_TEF
        return y_TEF + adapter.scale * every_expert(low_rank(x, adapter), adapter.b)

    def low_rank(x: jax.Array, adapter: Adapter) -> jax.Array:
        low_TEK = every_expert(dropped(x, adapter), adapter.a)
        return jnp.concatenate([mask_ranks(low_TEK[:tokens], adapter), low_TEK[tokens:]])

    tokens = len(x_TD)
    chosen_TCE = jax.nn.one_hot(local_TC, experts["gate"].shape[0], dtype=weights_TC.dtype)  # of other devices: zeros
    weights_TE1 = padded_rows(jnp.sum(weights_TC[..., None] * chosen_TCE, axis=1))[..., None]
    x_TD = padded_rows(x_TD)
    hidden_TEF = jax.nn.silu(project_each("gate", x_TD)) * project_each("up", x_TD)
    hidden_TEF = jnp.where(weights_TE1 == 0, 0, hidden_TEF) * weights_TE1  # what overflows where nobody asked is no NaN
    y_TD, adapter = sum_of_experts(hidden_TEF, experts["down"]), adapters.get("down")
    if adapter is not None:
        y_TD += adapter.scale * sum_of_experts(low_rank(hidden_TEF, adapter), adapter.b)
    return y_TD[:tokens]


def _run_choices(
    x_TD: jax.Array, weights_TC: jax.Array, local_TC: jax.Array, experts: Tree, adapters: Adapters
) -> jax.Array:
    """`_run_part` for a token or two on a TPU, which choose a small part of the experts: those alone are read."""
    held = experts["gate"].shape[0]

    def multiply(name: str, x_1D: jax.Array, token: int, expert: jax.Array) -> jax.Array:
        weight, adapter = experts[name], adapters.get(name)
        weight = weight.at(expert) if isinstance(weight, Fp8Weight) else weight[expert]
        if adapter is not None:
            adapter = dataclasses.replace(adapter, a=adapter.a[expert], b=adapter.b[expert])
            if isinstance(adapter, StackedAdapter):
                adapter = dataclasses.replace(adapter, index=adapter.index[token : token + 1])
        return project(x_1D, weight, 1, adapter)

    def of_choice(token: int, choice: int) -> jax.Array:
        expert, x_1D = local_TC[token, choice], x_TD[token : token + 1]
        weight = jnp.where((expert >= 0) & (expert < held), weights_TC[token, choice], 0)
        expert = jnp.clip(expert, 0, held - 1)
        gate_1F, up_1F = (multiply(name, x_1D, token, expert) for name in ("gate", "up"))
        hidden_1F = jnp.where(weight == 0, 0, jax.nn.silu(gate_1F) * up_1F) * weight
        return multiply("down", hidden_1F, token, expert)

    tokens, choices = local_TC.shape
    return jnp.concatenate(
        [functools.reduce(jnp.add, [of_choice(token, choice) for choice in range(choices)]) for token in range(tokens)]
    )


@jax.custom_vjp
def dispatch(x_TD: jax.Array, token_R: jax.Array, place_TC: jax.Array, rows: jax.Array) -> jax.Array:
    """Each row's token. The first `rows` rows count; the rest are other devices'."""
    return x_TD[token_R]


@jax.custom_vjp
def combine(y_RD: jax.Array, token_R: jax.Array, place_TC: jax.Array, rows: jax.Array) -> jax.Array:
    """The sum of each token's rows: the transpose of `dispatch`, as it is its gradient."""
    return _sum_rows(y_RD, place_TC, rows)


def _sum_rows(y_RD: jax.Array, place_TC: jax.Array, rows: jax.Array) -> jax.Array:
    picked = (jnp.where((place < rows)[:, None], y_RD[place], 0) for place in place_TC.T)
    return functools.reduce(jnp.add, picked)


def _take_rows(y_TD: jax.Array, token_R: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.where((jnp.arange(token_R.shape[0]) < rows)[:, None], y_TD[token_R], 0)


dispatch.defvjp(
    lambda x_TD, token_R, place_TC, rows: (x_TD[token_R], (place_TC, rows)),
    lambda residuals, dx_RD: (_sum_rows(dx_RD, *residuals), None, None, None),
)
combine.defvjp(
    lambda y_RD, token_R, place_TC, rows: (_sum_rows(y_RD, place_TC, rows), (token_R, rows)),
    lambda residuals, dy_TD: (_take_rows(dy_TD, *residuals), None, None, None),
)


def use_fused_ffn(x_TD: jax.Array, experts: Tree, adapters: Mapping[str, Adapter], rows: int) -> bool:
    """Whether `fused_moe_ffn` is as exact as the grouped matmuls one by one, for no more products than theirs."""
    many, width, narrow = experts["gate"].shape
    few = bool(adapters) and rows * (width + narrow) < many * width * narrow  # adding adapters would cost more
    exact = x_TD.dtype == jnp.float32 and experts["gate"].dtype in (jnp.float32, E4M3)
    # to each expert's weights the adapter of one row alone could be added
    alike = all(adapter.key is None and not isinstance(adapter, StackedAdapter) for adapter in adapters.values())
    return exact and not few and alike
