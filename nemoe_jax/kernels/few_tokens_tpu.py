"""Products of a few tokens on TPUs: what takes time is reading the weights, once each, where they lie.

Flattened axes and `ragged_dot` want weights in one layout. Cut over devices, they often lie in another: the stacks of
all layers were copied before the first step of decoding, and each layer's slice of them in every step. Here axes stay
as they are, and every expert multiplies every token.

With one row a product becomes sums on the vector unit, which take almost three times as long: it gets a second one.

T tokens, D inputs, E experts, F outputs.
"""

import functools
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from nemoe_jax.kernels.backend import target_platform
from nemoe_jax.kernels.fp8 import has_fp8_products, quantize_rows
from nemoe_jax.kernels.grouped_matmul.dispatch import precision_of
from nemoe_jax.spec.fp8_weight import Fp8Weight

FEW_TOKENS = 512


def are_few_on_tpu(tokens: int) -> bool:
    """Whether so many tokens are better multiplied with weights as they lie, were it with all experts'.

    By the compiler's cycles of a forward pass of the 12B-16E over a v5e:2x4: 512 tokens with all experts 36 million,
    with the chosen ones 40 million besides the products themselves; 1024 tokens 55.5 and 55.2.
    """
    return target_platform() == "tpu" and tokens <= FEW_TOKENS


def padded_rows(x: jax.Array) -> jax.Array:
    """On a TPU at least two rows (T, …), the second one zero where one is given; elsewhere x."""
    if target_platform() != "tpu" or len(x) > 1:
        return x
    return jnp.concatenate([x, jnp.zeros_like(x)])


def every_expert(x: jax.Array, w_EDF: jax.Array | Fp8Weight) -> jax.Array:
    """Tokens (T, D), or what each expert has of them (T, E, D), times (E, D, F): (T, E, F) in x's dtype."""
    subscripts = "td,edf->tef" if x.ndim == 2 else "ted,edf->tef"
    if _is_multiplied_in_fp8(w_EDF, x.dtype):
        return _every_expert_in_fp8(subscripts, x, w_EDF)
    return jnp.einsum(subscripts, x, _dequantized(w_EDF, x.dtype), precision=precision_of(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _every_expert_in_fp8(subscripts, x, w_EDF):
    rounded, scale = quantize_rows(x)
    y_TEF = jnp.einsum(subscripts, rounded, w_EDF.values, preferred_element_type=jnp.float32)
    return (y_TEF * w_EDF.scale[:, 0] * scale.reshape(len(x), -1, 1)).astype(x.dtype)


def _forward(subscripts, x, w_EDF):
    return _every_expert_in_fp8(subscripts, x, w_EDF), w_EDF


def _backward(subscripts, w_EDF, dy_TEF):
    """As if x were not rounded."""
    of_x = subscripts.partition(",")[0]
    return jnp.einsum(f"tef,edf->{of_x}", dy_TEF, w_EDF.dequantized(dy_TEF.dtype, stacked=1)), None


_every_expert_in_fp8.defvjp(_forward, _backward)


def sum_of_experts(x_TED: jax.Array, w_EDF: jax.Array | Fp8Weight) -> jax.Array:
    """What each expert has of the tokens (T, E, D), times (E, D, F), summed over the experts: (T, F) in x's dtype."""
    if _is_multiplied_in_fp8(w_EDF, x_TED.dtype):
        return every_expert(x_TED, w_EDF).astype(jnp.float32).sum(axis=1).astype(x_TED.dtype)
    w_EDF = _dequantized(w_EDF, x_TED.dtype)
    return jnp.einsum("ted,edf->tf", x_TED, w_EDF, precision=precision_of(x_TED.dtype))


def _is_multiplied_in_fp8(w_EDF: jax.Array | Fp8Weight, dtype: Any) -> TypeGuard[Fp8Weight]:
    return isinstance(w_EDF, Fp8Weight) and w_EDF.is_fp8 and w_EDF.scale.shape[1] == 1 and has_fp8_products(dtype)


def _dequantized(w_EDF: jax.Array | Fp8Weight, dtype: Any) -> jax.Array:
    return w_EDF.dequantized(dtype, stacked=1) if isinstance(w_EDF, Fp8Weight) else w_EDF.astype(dtype)
