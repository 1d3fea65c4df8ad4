"""The reference model's log-probabilities of responses: computed once, before the phase, and kept on disk.

The reference is the model as the phase begins; with fresh adapters that is the model without them, and there is no
second one in memory. A file is named by a hash of the weights, the tokens and how they are packed.

Letters: R rows of a source, S slots of a row.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nemoe_jax.errors import UserError
from nemoe_jax.spec.schema import Tree
from nemoe_jax.utils.progress import progress_bar
from train.data.loader import Corpus, PairBatch, stacked
from train.data.preference_packing import PackedPairs
from train.data.token_cache import default_cache
from train.step.batch_sharding import place_whole
from train.step.preference import PreferenceObjective
from train.step.step import Flat

VERSION = 1  # of what the files hold


def with_reference(
    objective: PreferenceObjective,
    trainable: Tree,
    frozen: Flat,
    corpus: Corpus,
    held_out: Sequence[PairBatch],
    mesh: Mesh | None,
) -> list[PairBatch]:
    """Fills in the reference's log-probabilities of the corpus' rows that a phase visits; returns the held-out batches
    with theirs.

    Args:
        trainable: what is trained, as it is before the first step.
    """
    phase, data = objective.phase, objective.phase.data
    everywhere = NamedSharding(mesh, PartitionSpec()) if mesh else None
    compute = jax.jit(objective.response_logprobs, out_shardings=everywhere)

    def logprobs(batch: PairBatch) -> np.ndarray:
        return np.asarray(compute(trainable, frozen, place_whole(batch, mesh)))

    weights = fingerprint({"trainable": trainable, "frozen": frozen})
    visited = corpus.visited(data.batch_size, phase.seed, phase.steps)
    for number, (packed, rows) in enumerate(zip(corpus.pairs, visited, strict=True)):
        path = (data.cache or default_cache()) / "reference" / f"{_key(objective, packed, weights)}.npy"
        _fill(packed, rows, path, data.microbatch_size, logprobs, f"reference {number}")
    return [dataclasses.replace(batch, reference=logprobs(batch)) for batch in held_out]


def _fill(
    packed: PackedPairs,
    rows: Sequence[int],
    path: Path,
    batch_size: int,
    logprobs: Callable[[PairBatch], np.ndarray],
    name: str,
) -> None:
    """Puts those rows' log-probabilities into `packed.reference`: the file's, and what it lacks computed."""
    own = packed.reference.shape
    table_RS = np.full(own, np.nan, np.float32)
    if path.exists():
        try:
            kept = np.load(path)
        except (OSError, ValueError):
            kept = table_RS  # damaged: computed anew
        table_RS = kept if kept.shape == own else table_RS
    missing = [row for row in rows if np.isnan(table_RS[row, 0])]
    with progress_bar() as bar:
        task = bar.add_task(name, total=len(missing))
        for first in range(0, len(missing), batch_size):
            chosen = missing[first : first + batch_size]
            filled = chosen + [chosen[-1]] * (batch_size - len(chosen))
            found = logprobs(stacked([packed[row] for row in filled]))
            table_RS[chosen] = found[: len(chosen), : own[1]]
            bar.update(task, completed=first + len(chosen))
    if np.isnan(table_RS[rows]).any():
        raise UserError(f"{name}: the model gives log-probabilities that are not finite")
    if missing and jax.process_index() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(".new.npy")
            np.save(new, table_RS)
            new.replace(path)
        except OSError as error:
            raise UserError(f"data.cache: {path.parent}: {error.strerror}") from error
    packed.reference = np.nan_to_num(table_RS)


def _key(objective: PreferenceObjective, packed: PackedPairs, weights: str) -> str:
    tokens = packed.tokens
    depends = [VERSION, weights, objective.recipe.dtype, packed.sequence_length, packed.group]
    digest = hashlib.sha256(json.dumps(depends).encode())
    for array in (tokens.tokens_N, tokens.mask, tokens.offsets):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def fingerprint(arrays: Any) -> str:
    """A hash of arrays' names, dtypes, shapes and values, which does not depend on the mesh."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    sums = jax.device_get([_position_sum(array) for _, array in leaves])
    names = [f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}" for path, array in leaves]
    return hashlib.sha256(repr([*zip(names, map(int, sums), strict=True)]).encode()).hexdigest()


@jax.jit
def _position_sum(array: jax.Array) -> jax.Array:
    """Σ over the elements of a mixed word of value and place, modulo 2^32."""
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    strides = [int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) % (1 << 32) for axis in range(array.ndim)]
    place = functools.reduce(
        jnp.add,
        (
            jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride)
            for axis, stride in enumerate(strides)
        ),
        jnp.zeros(array.shape, jnp.uint32),
    )
    word = bits * jnp.uint32(0x85EBCA6B) + place * jnp.uint32(0x9E3779B1)
    word = (word ^ (word >> 15)) * jnp.uint32(0x2C1B3C6D)
    return jnp.sum(word ^ (word >> 13), dtype=jnp.uint32)
