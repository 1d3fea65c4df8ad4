"""Losses over a vocabulary so large that the logits of all tokens are never held at once.

`chunked_sums` goes through the tokens in chunks: for each, the head's logits, the losses and, where a gradient is
asked for, at once the gradients with respect to the hidden states and to whatever of the head is trained. So the head
is computed once forward and once backward, nothing is kept but gradients of the hidden states' size, and a frozen head
never gets a gradient.

Letters: B batch, T sequence, D embed, V vocabulary, C tokens of a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from nemoe_jax.spec.mesh import batch_axes

Sums = dict[str, Array]
# (trained part of the head, {name: (B, C, …)} of a chunk, everything else) -> (sum to differentiate, sums to report)
ChunkLoss = Callable[[Any, dict[str, Array], Any], tuple[Array, Sums]]


def forward_kl(student_BTV: Array, teacher_BTV: Array) -> Array:
    """KL(teacher ‖ student) = Σ_v p_v (log p_v − log q_v) of each token, (B, T), at temperature 1, in nats; float32."""
    student_BTV = jax.nn.log_softmax(student_BTV.astype(jnp.float32))
    teacher_BTV = jax.nn.log_softmax(teacher_BTV.astype(jnp.float32))
    return jnp.sum(jnp.exp(teacher_BTV) * (teacher_BTV - student_BTV), axis=-1)


def masked_sum(values_BT: Array, mask_BT: Array) -> Array:
    """Σ mask · value; a value where the mask is 0 may be infinite."""
    return jnp.where(mask_BT > 0, values_BT * mask_BT, 0.0).sum()


def chunked_sums(
    loss: ChunkLoss, trained: Any, hidden_BTD: Array, tokens: dict[str, Array], rest: Any, chunk: int
) -> tuple[Array, Sums]:
    """The sums of `loss` over all chunks of tokens; differentiable in `trained` and `hidden_BTD` alone.

    Args:
        loss: given the trained part, {"hidden": (B, C, D)} and a chunk of each of `tokens`, and `rest`.
        tokens: more arrays (B, T, …); where the chunks do not come out even they are filled up with zeros, and so must
            give no loss there (a mask of 0).
        rest: the frozen head and the like.
        chunk: tokens on one device in a chunk, at most (but one of each of its rows at least).
    """
    chunks = _cut({"hidden": hidden_BTD} | tokens, chunk)
    return _summed(loss, trained, chunks.pop("hidden"), chunks, rest)


def _cut(arrays: dict[str, Array], chunk: int) -> dict[str, Array]:
    """(B, T, …) -> (chunks, B, shards of the sequence · C, …), so that each device cuts its own tokens."""
    batch, length = arrays["hidden"].shape[:2]
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape.get("sequence", 1)
    rows = () if mesh.empty else batch_axes(mesh.shape, batch)
    for axis in rows:
        batch //= mesh.shape[axis]
    own = length // shards  # tokens of a row on one device
    count = -(-own * batch // chunk)
    width = -(-own // min(count, own))
    count = -(-own // width)

    def cut(array: Array) -> Array:
        array = array.reshape(array.shape[0], shards, own, *array.shape[2:])
        array = jnp.pad(array, [(0, 0), (0, 0), (0, count * width - own)] + [(0, 0)] * (array.ndim - 3))
        array = jnp.moveaxis(array.reshape(*array.shape[:2], count, width, *array.shape[3:]), 2, 0)
        if not mesh.empty:
            place = PartitionSpec(None, rows or None, "sequence" if shards > 1 else None)
            array = jax.lax.with_sharding_constraint(array, place)
        return array.reshape(count, array.shape[1], shards * width, *array.shape[4:])

    return {name: cut(array) for name, array in arrays.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(loss: ChunkLoss, trained: Any, hidden: Array, tokens: dict[str, Array], rest: Any) -> tuple[Array, Sums]:
    def step(total: Any, chunk: dict[str, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, loss(trained, chunk, rest)), None

    chunks = {"hidden": hidden} | tokens
    return jax.lax.scan(step, _zeros(loss, trained, chunks, rest), chunks)[0]


def _zeros(loss: ChunkLoss, trained: Any, chunks: dict[str, Array], rest: Any) -> Any:
    first = {name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in chunks.items()}
    return jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), jax.eval_shape(loss, trained, first, rest))


def _forward(loss: ChunkLoss, trained: Any, hidden: Array, tokens: dict[str, Array], rest: Any) -> Any:
    def step(carry: Any, chunk: dict[str, Array]) -> tuple[Any, Array]:
        total, gradient = carry

        def of(trained: Any, hidden: Array) -> tuple[Array, Sums]:
            return loss(trained, chunk | {"hidden": hidden}, rest)

        value, (of_trained, of_hidden) = jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(trained, chunk["hidden"])
        gradient = jax.tree.map(lambda sofar, part: sofar + part.astype(jnp.float32), gradient, of_trained)
        return (jax.tree.map(jnp.add, total, value), gradient), of_hidden

    chunks = {"hidden": hidden} | tokens
    nothing = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), trained)
    (total, gradient), of_hidden = jax.lax.scan(step, (_zeros(loss, trained, chunks, rest), nothing), chunks)
    gradient = jax.tree.map(lambda part, array: part.astype(array.dtype), gradient, trained)
    return total, (gradient, of_hidden)


def _backward(loss: ChunkLoss, gradients: Any, cotangent: tuple[Array, Sums]) -> tuple[Any, Array, None, None]:
    of_trained, of_hidden = jax.tree.map(lambda part: (part * cotangent[0]).astype(part.dtype), gradients)
    return of_trained, of_hidden, None, None


_summed.defvjp(_forward, _backward)
