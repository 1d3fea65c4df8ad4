"""Weights of a layer that are read where they lie, among those of all layers: for steps of decoding.

A scan hands each layer a slice of the stacked weights, which products on TPUs read in place. On CPU and GPU the slice
is copied first, with all experts of the layer, which costs several times what reading the weights that a few tokens
need does. There a step takes the stack and a number instead.

T tokens, D embed, F outputs, L layers, E experts, C top-k, R = T·C rows, K rank of adapters.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from nemoe_jax.adapters.lora import Adapter, dropped
from nemoe_jax.adapters.multi_lora import mask_ranks, with_index
from nemoe_jax.kernels.backend import target_platform
from nemoe_jax.kernels.decode_matmul_cpu import MOST_ROWS, as_uint16, decode_expert_matmul, decode_matmul
from nemoe_jax.kernels.fp8 import fp8_matmul
from nemoe_jax.spec.fp8_weight import Fp8Weight
from nemoe_jax.spec.mesh import spans_devices
from nemoe_jax.spec.schema import Tree, map_with_path


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstacked:
    """A stack as its layers, views of it on CPU: for more tokens than kernels take, dots that read them in place."""

    layers: tuple[jax.Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.layers), *self.layers[0].shape

    @classmethod
    def of(cls, stack: jax.Array) -> "Unstacked":
        views = np.asarray(stack)
        return cls(tuple(jax.device_put(view, stack.sharding, may_alias=True) for view in views))

    def multiply(self, x_RD: jax.Array, layer: int | jax.Array) -> jax.Array:
        """x @ stack[layer], with outputs flattened."""
        ways = [functools.partial(jnp.matmul, b=w.reshape(x_RD.shape[1], -1)) for w in self.layers]
        return jax.lax.switch(layer, ways, x_RD)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerSlice:
    """`stack[layer]`, not yet read. A stack of uint16 on CPU holds the bits of bfloat16."""

    stack: jax.Array | Fp8Weight | Unstacked
    layer: int | jax.Array

    def multiply(self, x: jax.Array, inputs: int) -> jax.Array:
        """x's last `inputs` axes contracted with the layer's first ones, in x's dtype."""
        rows, outputs = x.shape[: x.ndim - inputs], self.stack.shape[1 + inputs :]
        depth = math.prod(x.shape[x.ndim - inputs :])
        product: Callable[..., jax.Array] = decode_matmul
        if target_platform() == "gpu":
            from nemoe_jax.kernels.grouped_matmul.gpu import gpu_few_rows as product
        x_RD = x.reshape(-1, depth)
        if isinstance(self.stack, Unstacked):
            return self.stack.multiply(x_RD, self.layer).reshape(*rows, *outputs)
        if not isinstance(self.stack, Fp8Weight):
            y_RF = product(x_RD, self.stack.reshape(self.stack.shape[0], depth, -1), self.layer)
        elif has_one_block(self.stack, 1):
            flat = self.stack.matrices(1)
            y_RF = product(_as_kernels_read(x_RD), flat.values, self.layer) * flat.scale[self.layer]
        else:
            y_RF = fp8_matmul(x_RD, self.stack.matrices(1).at(self.layer))
        return y_RF.astype(x.dtype).reshape(*rows, *outputs)

    def multiply_each(self, x_RD: jax.Array, expert_R: jax.Array) -> jax.Array:
        """Each row with its own expert's matrix: (R, F)."""
        product: Callable[..., jax.Array] = decode_expert_matmul
        if target_platform() == "gpu":
            from nemoe_jax.kernels.grouped_matmul.gpu import gpu_few_rows_experts as product
        if not isinstance(self.stack, Fp8Weight):
            return product(x_RD, self.stack, self.layer, expert_R)
        if has_one_block(self.stack, 2):
            y_RF = product(_as_kernels_read(x_RD), self.stack.values, self.layer, expert_R)
            return (y_RF * self.stack.scale[self.layer, expert_R, 0]).astype(x_RD.dtype)
        return jax.lax.map(
            lambda row: fp8_matmul(row[0][None], self.stack.at(self.layer).at(row[1]))[0], (x_RD, expert_R)
        )


def _as_kernels_read(x: jax.Array) -> jax.Array:
    """Rows whose product has scales still to be multiplied with: on CPU unrounded until then, as they are summed."""
    return x.astype(jnp.float32) if target_platform() == "cpu" else x


def has_one_block(weight: Fp8Weight, stacked: int) -> bool:
    """Whether the scales are those of outputs alone, so that they can be multiplied with after the product."""
    return weight.scale.shape[stacked] == 1


def cache_scale(weight: Any) -> jax.Array | None:
    """What keys or values are divided by in an FP8 cache, where their projection's weights say so."""
    of_layer, layer = (weight.stack, weight.layer) if isinstance(weight, LayerSlice) else (weight, None)
    if not isinstance(of_layer, Fp8Weight) or of_layer.cache_scale is None:
        return None
    return of_layer.cache_scale if layer is None else of_layer.cache_scale[layer]


def use_inplace_weights(rows: int, weight: Any) -> bool:
    """Whether a step with so many tokens reads a weight where it lies: of FP8 weights those with a scale an output."""
    if isinstance(weight, Unstacked):
        return True
    mesh = jax.sharding.get_abstract_mesh()
    if rows > MOST_ROWS or spans_devices(mesh):
        return False
    if isinstance(weight, Fp8Weight):
        return target_platform() in ("cpu", "gpu") and has_one_block(weight, 1) and weight.is_fp8
    return target_platform() == "gpu" or (target_platform() == "cpu" and weight.dtype in (jnp.float32, jnp.uint16))


def prepare_decode_params(params: Tree, rows: int) -> Tree:
    """The parameters as steps with so many tokens take them on CPU, where they are read in place: bfloat16 as bits.

    With more tokens than kernels take, those of dense models in float32 are unstacked.
    """
    if not _is_on_one_cpu(params) or (rows > MOST_ROWS and not can_unstack(params)):
        return params
    if rows > MOST_ROWS:
        blocks = map_with_path(
            lambda path, array: array if path.endswith(("norm", "bias")) else Unstacked.of(array), params["blocks"]
        )
        return params | {"blocks": blocks}
    matrices = {name: tree for name, tree in params.items() if name in ("blocks", "head")}
    return params | map_with_path(
        lambda path, array: (
            array if path.endswith(("norm", "bias")) or isinstance(array, Fp8Weight) else as_uint16(array)
        ),
        matrices,
    )


def can_unstack(params: Tree) -> bool:
    """Whether steps with more tokens than kernels take read the weights in place."""
    dtypes = {array.dtype for array in jax.tree.leaves(params["blocks"])}
    return _is_on_one_cpu(params) and set(params["blocks"]) == {"dense"} and dtypes == {jnp.dtype(jnp.float32)}


def _is_on_one_cpu(params: Tree) -> bool:
    spread = spans_devices(jax.sharding.get_abstract_mesh()) or len(params["embed"].sharding.device_set) > 1
    return target_platform() == "cpu" and not spread


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
