"""Weights of a layer that are read where they lie, among those of all layers: for steps of decoding.

A scan hands each layer a slice of the stacked weights. TPUs read it in place; on CPU and GPU it is copied first, with
all experts of the layer, which costs several times what reading the weights that a few tokens need does. There a step
takes the stack and a number instead.

T tokens, D embed, F outputs, L layers, E experts, C top-k, R = T·C rows, K rank of adapters.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from nemoe_jax.adapters.lora import Adapter, dropped
from nemoe_jax.adapters.multi_lora import mask_ranks, with_index
from nemoe_jax.kernels.backend import target_platform
from nemoe_jax.kernels.decode_matmul_cpu import MOST_ROWS, as_uint16, decode_expert_matmul, decode_matmul
from nemoe_jax.spec.mesh import spans_devices
from nemoe_jax.spec.schema import Tree, map_with_path


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerSlice:
    """`stack[layer]`, not yet read. A stack of uint16 on CPU holds the bits of bfloat16."""

    stack: jax.Array
    layer: int | jax.Array

    def multiply(self, x: jax.Array, inputs: int) -> jax.Array:
        """x's last `inputs` axes contracted with the layer's first ones, in x's dtype."""
        rows, outputs = x.shape[: x.ndim - inputs], self.stack.shape[1 + inputs :]
        depth = math.prod(x.shape[x.ndim - inputs :])
        w_LDF = self.stack.reshape(self.stack.shape[0], depth, -1)
        product: Callable[..., jax.Array] = decode_matmul
        if target_platform() == "gpu":
            from nemoe_jax.kernels.grouped_matmul.gpu import gpu_few_rows as product
        return product(x.reshape(-1, depth), w_LDF, self.layer).reshape(*rows, *outputs)

    def multiply_each(self, x_RD: jax.Array, expert_R: jax.Array) -> jax.Array:
        """Each row with its own expert's matrix: (R, F)."""
        product: Callable[..., jax.Array] = decode_expert_matmul
        if target_platform() == "gpu":
            from nemoe_jax.kernels.grouped_matmul.gpu import gpu_few_rows_experts as product
        return product(x_RD, self.stack, self.layer, expert_R)


def use_inplace_weights(rows: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether a step with so many tokens reads weights of that dtype where they lie."""
    mesh = jax.sharding.get_abstract_mesh()
    if rows > MOST_ROWS or spans_devices(mesh):
        return False
    return target_platform() == "gpu" or (target_platform() == "cpu" and dtype in (jnp.float32, jnp.uint16))


def prepare_decode_params(params: Tree, rows: int) -> Tree:
    """The parameters as steps with so many tokens take them: where they are read in place on CPU, bfloat16 as bits."""
    if (
        target_platform() != "cpu"
        or not use_inplace_weights(rows, jnp.uint16)
        or len(params["embed"].sharding.device_set) > 1
    ):
        return params
    matrices = {name: tree for name, tree in params.items() if name in ("blocks", "head")}
    return params | map_with_path(
        lambda path, array: array if path.endswith(("norm", "bias")) else as_uint16(array), matrices
    )


def decode_experts(
    x_BTD: jax.Array,
    weights_BTC: jax.Array,
    chosen_BTC: jax.Array,
    experts: dict[str, LayerSlice],
    adapters: Mapping[str, Adapter],
    index_BT: jax.Array | None,
) -> jax.Array:
    """What the chosen experts add to a few tokens, (B, T, D): each row reads its own expert's weights alone.

    Where the adapters are those of a bank, `index_BT` says which of them is a token's own.
    """
    top_k, width = chosen_BTC.shape[-1], x_BTD.shape[-1]
    order_R = jnp.argsort(chosen_BTC.reshape(-1))  # rows of one expert find its weights in the cache
    expert_R = chosen_BTC.reshape(-1)[order_R]
    token_R = order_R // top_k
    if index_BT is not None:
        adapters = with_index(adapters, index_BT.reshape(-1)[token_R])

    def multiply(name: str, x_R: jax.Array) -> jax.Array:
        y_R, adapter = experts[name].multiply_each(x_R, expert_R), adapters.get(name)
        if adapter is None:
            return y_R
        low_rank_RK = mask_ranks(adapter.a.multiply_each(dropped(x_R, adapter), expert_R), adapter)
        return y_R + adapter.scale * adapter.b.multiply_each(low_rank_RK, expert_R)

    x_RD = x_BTD.reshape(-1, width)[token_R]
    gate_RF, up_RF = multiply("gate", x_RD), multiply("up", x_RD)
    hidden_RF = jax.nn.silu(gate_RF) * up_RF * weights_BTC.reshape(-1, 1)[order_R]
    y_RD = multiply("down", hidden_RF)
    return y_RD[jnp.argsort(order_R)].reshape(-1, top_k, width).sum(axis=1).reshape(x_BTD.shape)
