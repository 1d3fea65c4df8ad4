"""Losses over a vocabulary so large that the logits of all tokens are never held at once.

`chunked_sums` goes through the tokens that count in chunks: for each, the head's logits, the losses and, where a
gradient is asked for, at once the gradients with respect to the hidden states and to whatever of the head is trained.
So the head is computed once forward and once backward, nothing is kept but gradients of the hidden states' size, and a
frozen head never gets a gradient.

Tokens with a mask of 0 carry no loss, and no logits are computed for them: each device puts its tokens that count
first, and the loop ends behind the last of them. Its bound is a number in the program, not a shape, so that nothing is
compiled anew and no token is ever left out, however many count.

Letters: B batch, T sequence, D embed, V vocabulary, G devices that tokens are cut over, N tokens of each, C of a chunk.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from nemoe_jax.spec.mesh import batch_axes

# The last chunk is half full on average: so many chunks at least, unless they would be too narrow for fast products.
MIN_CHUNKS, MIN_WIDTH = 8, 128

Sums = dict[str, Array]
# (trained part of the head, {name: (B, C, …)} of a chunk, everything else) -> (sum to differentiate, sums to report)
ChunkLoss = Callable[[Any, dict[str, Array], Any], tuple[Array, Sums]]


def masked_sum(values_BT: Array, mask_BT: Array) -> Array:
    """Σ mask · value; a value where the mask is 0 may be infinite."""
    return jnp.where(mask_BT > 0, values_BT * mask_BT, 0.0).sum()


def chunked_sums(
    loss: ChunkLoss,
    trained: Any,
    hidden_BTD: Array,
    tokens: dict[str, Array],
    rest: Any,
    chunk: int,
    all_count: bool = False,
) -> tuple[Array, Sums]:
    """The sums of `loss` over the tokens that count; differentiable in `trained` and `hidden_BTD` alone.

    Args:
        loss: given the trained part, `rest`, and of a chunk {"hidden": (G, C, D), "number": which chunk it is} and each
            of `tokens`. The last chunk is filled up with tokens that have a mask of 0, and so must give no loss.
        tokens: "mask" (B, T), 0 where a token does not count, and more arrays (B, T, …).
        rest: the frozen head and the like.
        chunk: tokens on one device in a chunk, at most.
        all_count: compute every token, whatever the mask: the loop's bound is then a constant of the program.
    """
    batch, length, _ = hidden_BTD.shape
    layout = _Layout.of(batch, length, chunk, all_count)
    grouped = {name: layout.by_device(array) for name, array in tokens.items()}
    return _summed(loss, layout, trained, layout.by_device(hidden_BTD), grouped, rest)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How (B, T) tokens are cut over the devices, and the tokens of each into chunks."""

    rows: tuple[str, ...]  # mesh axes that the batch is cut over
    row_shards: int
    sequence_shards: int
    width: int  # tokens of a chunk on one device
    chunks: int  # where all tokens count
    all_count: bool

    @classmethod
    def of(cls, batch: int, length: int, chunk: int, all_count: bool) -> "_Layout":
        mesh = jax.sharding.get_abstract_mesh()
        rows = () if mesh.empty else batch_axes(mesh.shape, batch)
        row_shards = math.prod(mesh.shape[axis] for axis in rows)
        sequence_shards = 1 if mesh.empty else mesh.shape.get("sequence", 1)
        own = batch * length // (row_shards * sequence_shards)
        chunks = max(-(-own // chunk), min(MIN_CHUNKS, own // MIN_WIDTH))
        width = -(-own // chunks)
        return cls(rows, row_shards, sequence_shards, width, -(-own // width), all_count)

    def by_device(self, array: Array) -> Array:
        """(B, T, …) -> (G, N, …): of each device its own tokens, which no device has to ask another for."""
        batch, length, *other = array.shape
        array = array.reshape(
            self.row_shards, batch // self.row_shards, self.sequence_shards, length // self.sequence_shards, *other
        )
        array = jnp.moveaxis(array, 2, 1).reshape(self.row_shards * self.sequence_shards, -1, *other)
        axes = (*self.rows, *(["sequence"] if self.sequence_shards > 1 else []))
        if jax.sharding.get_abstract_mesh().empty:
            return array
        return jax.lax.with_sharding_constraint(array, PartitionSpec(axes or None))

    def order(self, mask_GN: Array) -> tuple[Array, Any]:
        """(numbers of each device's tokens, those that count first; number of chunks until none does).

        The numbers are filled up to whole chunks with one that is no token's.
        """
        order_GN = jnp.argsort(mask_GN == 0, axis=1, stable=True)
        filling = self.width * self.chunks - order_GN.shape[1]
        order_GN = jnp.pad(order_GN, ((0, 0), (0, filling)), constant_values=order_GN.shape[1])
        most = jnp.max(jnp.sum(mask_GN != 0, axis=1))
        return order_GN, self.chunks if self.all_count else (most + self.width - 1) // self.width

    def chunk(self, tokens: dict[str, Array], order_GN: Array, number: Array) -> dict[str, Array]:
        """A chunk's part of each array, and its number; 0 for what is no token."""
        chosen_GC = jax.lax.dynamic_slice_in_dim(order_GN, number * self.width, self.width, axis=1)
        return {name: _take(array, chosen_GC) for name, array in tokens.items()} | {"number": number}


def _take(array_GN: Array, places_GC: Array) -> Array:
    """(G, N, …), (G, C) -> (G, C, …); 0 for places beyond the array."""
    take = jax.vmap(lambda array, places: array.at[places].get(mode="fill", fill_value=0))
    return take(array_GN, places_GC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
    loss: ChunkLoss, layout: _Layout, trained: Any, hidden: Array, tokens: dict[str, Array], rest: Any
) -> tuple[Array, Sums]:
    order_GN, chunks = layout.order(tokens["mask"])
    tokens = {"hidden": hidden} | tokens

    def step(number: Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, loss(trained, layout.chunk(tokens, order_GN, number), rest))

    return jax.lax.fori_loop(0, chunks, step, _zeros(loss, layout, trained, tokens, order_GN, rest))


def _zeros(loss: ChunkLoss, layout: _Layout, trained: Any, tokens: dict[str, Array], order_GN: Array, rest: Any) -> Any:
    def first(tokens: dict[str, Array], order_GN: Array) -> tuple[Array, Sums]:
        return loss(trained, layout.chunk(tokens, order_GN, jnp.int32(0)), rest)

    return jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), jax.eval_shape(first, tokens, order_GN))


def _forward(loss: ChunkLoss, layout: _Layout, trained: Any, hidden: Array, tokens: dict[str, Array], rest: Any) -> Any:
    order_GN, chunks = layout.order(tokens["mask"])
    arrays = {"hidden": hidden} | tokens

    def step(number: Array, carry: Any) -> Any:
        total, of_head, of_hidden = carry
        chunk = layout.chunk(arrays, order_GN, number)

        def of(trained: Any, hidden: Array) -> tuple[Array, Sums]:
            return loss(trained, chunk | {"hidden": hidden}, rest)

        value, (more, new) = jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(trained, chunk["hidden"])
        of_head = jax.tree.map(lambda sofar, part: sofar + part.astype(jnp.float32), of_head, more)
        of_hidden = jax.lax.dynamic_update_slice_in_dim(of_hidden, new, number * layout.width, axis=1)
        return jax.tree.map(jnp.add, total, value), of_head, of_hidden

    nothing = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), trained)
    groups, _, width = hidden.shape
    ordered = jnp.zeros((groups, order_GN.shape[1], width), hidden.dtype)
    carry = _zeros(loss, layout, trained, arrays, order_GN, rest), nothing, ordered
    total, of_head, ordered = jax.lax.fori_loop(0, chunks, step, carry)
    counts_GN = tokens["mask"] != 0
    place_GN = jnp.where(counts_GN, jnp.cumsum(counts_GN, axis=1) - 1, ordered.shape[1])
    of_hidden = _take(ordered, place_GN)
    of_head = jax.tree.map(lambda part, array: part.astype(array.dtype), of_head, trained)
    return total, (of_head, of_hidden)


def _backward(
    loss: ChunkLoss, layout: _Layout, gradients: Any, cotangent: tuple[Array, Sums]
) -> tuple[Any, Array, None, None]:
    of_head, of_hidden = jax.tree.map(lambda part: (part * cotangent[0]).astype(part.dtype), gradients)
    return of_head, of_hidden, None, None


_summed.defvjp(_forward, _backward)
