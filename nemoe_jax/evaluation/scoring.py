"""How likely a model finds the ends of many token sequences: what the benchmarks and the sliding window are made of.

Sequences that differ in their last token alone, as the options of a multiple choice often do, share one forward pass.
Rows of similar length go together, filled up on the right to one of few lengths, so that few programs are compiled. The
head is computed only where a token is scored, so many positions at a time: logits of whole batches would be too large.

B batch, T sequence, D embed, V vocabulary, C positions of a chunk.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nemoe_jax.errors import UserError
from nemoe_jax.model.transformer import hidden_states, logits
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.mesh import use_mesh
from nemoe_jax.spec.schema import Tree
from nemoe_jax.utils.progress import progress_bar

CHUNK = 256  # positions whose logits are held at once: 134 MB at a vocabulary of 131072
SHORTEST = 32


class Ending(NamedTuple):
    """A token sequence whose last tokens are to be scored."""

    tokens: np.ndarray  # int32
    last: int  # how many of them, each given all before it: at least 1, and fewer than there are tokens


class Scores(NamedTuple):
    """Of the scored tokens of an `Ending`."""

    logprobs: np.ndarray  # float32, nats
    greedy: np.ndarray  # bool: whether the model finds no token likelier


def score(
    config: ModelConfig, params: Tree, endings: Sequence[Ending], batch_size: int = 8, mesh: Mesh | None = None
) -> list[Scores]:
    """Scores of each of the endings, in their order.

    Raises:
        UserError: a sequence with more than the context's tokens before its last one, with nothing to score in it, or
            with tokens that the embedding has no row for.
    """
    alike: dict[bytes, list[int]] = defaultdict(list)  # those with equal tokens before the last one
    for number, (tokens, last) in enumerate(endings):
        if not 1 <= last < len(tokens) <= config.context + 1:
            raise UserError(
                f"scoring: expected 2 to {config.context + 1} tokens (the context and one to predict), and some, not "
                f"all of them to score; got {len(tokens)} and {last}"
            )
        low, high = np.min(tokens), np.max(tokens)
        if low < 0 or high >= config.vocab:
            raise UserError(f"scoring: expected tokens from 0 to {config.vocab - 1}, got {low} to {high}")
        alike[np.asarray(tokens[:-1], np.int32).tobytes()].append(number)
    inputs = sorted(alike, key=len, reverse=True)  # what needs most memory comes first
    lots = [inputs[first : first + batch_size] for first in range(0, len(inputs), batch_size)]
    results: dict[int, Scores] = {}
    with progress_bar() as bar, use_mesh(mesh):
        for lot in bar.track(lots, description="scoring"):
            rows = [np.frombuffer(data, np.int32) for data in lot]
            tokens_BT = np.zeros((_batch(len(rows), batch_size), _length(len(rows[0]), config.context)), np.int32)
            for row, tokens in enumerate(rows):
                tokens_BT[row, : len(tokens)] = tokens
            numbers = [number for data in lot for number in alike[data]]
            row_of = [row for row, data in enumerate(lot) for _ in alike[data]]
            positions = [np.arange(len(endings[n].tokens) - 1)[-endings[n].last :] for n in numbers]
            targets = [np.asarray(endings[n].tokens[-endings[n].last :], np.int32) for n in numbers]
            row_Q = np.repeat(row_of, [len(part) for part in targets])
            found = _scores(config, params, tokens_BT, row_Q, np.concatenate(positions), np.concatenate(targets))
            ends = np.cumsum([len(part) for part in targets])
            for number, logprobs, greedy in zip(numbers, *(np.split(part, ends[:-1]) for part in found), strict=True):
                results[number] = Scores(logprobs, greedy)
    return [results[number] for number in range(len(endings))]


def _batch(rows: int, batch_size: int) -> int:
    """Rows are filled up to a power of two, or to the batch's size."""
    return min(1 << (rows - 1).bit_length(), batch_size)


def _length(length: int, context: int) -> int:
    """Lengths are filled up to 32, 48, 64, 96, 128 and so on, and to the context at most."""
    rounded = SHORTEST
    while rounded < length:
        rounded = rounded * 3 // 2 if rounded & (rounded - 1) == 0 else rounded * 4 // 3
    return min(rounded, context)


def _scores(
    config: ModelConfig, params: Tree, tokens_BT: np.ndarray, row_Q: np.ndarray, at_Q: np.ndarray, target_Q: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of tokens behind positions of rows, and whether each is the likeliest there."""
    x_BTD = _hidden(config, params, tokens_BT)
    wanted = np.stack([row_Q, at_Q, target_Q]).astype(np.int32)
    wanted = np.pad(wanted, [(0, 0), (0, -wanted.shape[1] % CHUNK)])
    parts = [
        _chunk(config, params, x_BTD, *wanted[:, first : first + CHUNK]) for first in range(0, wanted.shape[1], CHUNK)
    ]
    logprobs, greedy = (np.concatenate([np.asarray(part) for part in of]) for of in zip(*parts, strict=True))
    return logprobs[: len(row_Q)], greedy[: len(row_Q)]


@functools.partial(jax.jit, static_argnames="config")
def _hidden(config: ModelConfig, params: Tree, tokens_BT: jax.Array) -> jax.Array:
    return hidden_states(config, params, tokens_BT).x_BTD


@functools.partial(jax.jit, static_argnames="config")
def _chunk(
    config: ModelConfig, params: Tree, x_BTD: jax.Array, row_C: jax.Array, at_C: jax.Array, target_C: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return of_targets(logits(config, params, x_BTD[row_C, at_C][None])[0], target_C)


def of_targets(logits_CV: jax.Array, target_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p of each target, float32 in nats, and whether it is the likeliest token (the first of equals)."""
    chosen_C = jnp.take_along_axis(logits_CV, target_C[:, None], axis=1)[:, 0]
    return chosen_C - jax.nn.logsumexp(logits_CV, axis=1), jnp.argmax(logits_CV, axis=1) == target_C
