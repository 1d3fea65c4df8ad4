"""What every module is made of: parameters declared by the schema, one way to multiply with them, RMSNorm.

A module built from stacked specs holds stacked arrays; the transformer scans over their first axis and calls the
module on one layer's slice.

B batch, T sequence, D embed, R rank.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nemoe_jax.adapters.lora import Adapter, dropped
from nemoe_jax.adapters.multi_lora import mask_ranks
from nemoe_jax.kernels.few_tokens_tpu import are_few_on_tpu, padded_rows
from nemoe_jax.kernels.fp8 import fp8_matmul
from nemoe_jax.kernels.grouped_matmul.dispatch import grouped_matmul, precision_of
from nemoe_jax.model.decode_weights import LayerSlice
from nemoe_jax.spec.fp8_weight import FakeQuantized, Fp8Weight
from nemoe_jax.spec.schema import ParamSpec, Tree

Adapters = Mapping[str, Any]  # the adapter tree's part that belongs to a module; empty without adapters
NO_ADAPTERS: Adapters = {}


class SpecModule(nnx.Module):
    """Holds one `nnx.Param` for each ParamSpec among `specs`; nested dicts belong to the subclass's own modules."""

    def __init__(self, specs: Tree):
        own = {name: spec for name, spec in specs.items() if isinstance(spec, ParamSpec)}
        for name, spec in own.items():
            setattr(self, name, nnx.Param(jnp.zeros(spec.shape)))
        self.inputs = tuple((name, len(spec.contracted)) for name, spec in own.items())

    def weight(self, name: str) -> Any:
        """The array of that name, or the LayerSlice that stands for it."""
        return getattr(self, name).get_value()

    def project(
        self, name: str, x: jax.Array, adapters: Adapters = NO_ADAPTERS, group_sizes: jax.Array | None = None
    ) -> jax.Array:
        """`x @ W` plus the adapter's low-rank path `scale · (x @ A) @ B`: every weight multiplication of the model.

        Contracts x's last axes with the weight's contracted axes. With `group_sizes`, rows of x are sorted by expert
        and each meets its own expert's weight (and adapter).
        """
        return project(x, self.weight(name), dict(self.inputs)[name], adapters.get(name), group_sizes)


def project(
    x: jax.Array,
    weight: jax.Array | Fp8Weight | FakeQuantized | LayerSlice,
    inputs: int,
    adapter: Adapter | None,
    group_sizes: jax.Array | None = None,
) -> jax.Array:
    """`SpecModule.project` on a bare array whose first `inputs` axes (after that of the experts) are contracted."""
    if isinstance(weight, FakeQuantized):
        weight, adapter = weight.with_adapter(adapter, int(group_sizes is not None), inputs, x.dtype), None
    y = _contract(x, weight, inputs, group_sizes)
    if adapter is None:
        return y
    low_rank = mask_ranks(_contract(dropped(x, adapter), adapter.a, inputs, group_sizes), adapter)
    return y + adapter.scale * _contract(low_rank, adapter.b, 1, group_sizes)


def _contract(
    x: jax.Array, w: jax.Array | Fp8Weight | LayerSlice, inputs: int, group_sizes: jax.Array | None
) -> jax.Array:
    if isinstance(w, LayerSlice):
        return w.multiply(x, inputs)
    if group_sizes is not None:
        return grouped_matmul(x, w if isinstance(w, Fp8Weight) else w.astype(x.dtype), group_sizes)
    rows, outputs = x.shape[: x.ndim - inputs], w.shape[inputs:]
    count = math.prod(rows)
    x = padded_rows(x.reshape(count, *w.shape[:inputs]))
    if isinstance(w, Fp8Weight):
        return fp8_matmul(x, w)[:count].reshape(*rows, *outputs)
    assert w.dtype != jnp.uint16, "bits are no numbers"
    w, precision = w.astype(x.dtype), precision_of(x.dtype)
    if are_few_on_tpu(count):
        y = jnp.tensordot(x, w, inputs, precision=precision)
    else:  # one matrix product: on CPU the gradients of products over several axes are several times slower
        depth = math.prod(w.shape[:inputs])
        y = jnp.matmul(x.reshape(len(x), depth), w.reshape(depth, -1), precision=precision)
    return y[:count].reshape(*rows, *outputs)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) · weight over the last axis; the mean of squares in float32 (Zhang and Sennrich, 2019)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight.astype(x.dtype)
