"""`nemoe-train cache-teacher`: a recipe's teachers read the rows that its phases will visit, once.

Letters: B rows, T tokens of a row, D embed, V vocabulary, K tokens that are kept.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.checkpoints.fingerprint import weights_fingerprint
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.model import transformer
from nemoe_jax.model.token_chunks import num_chunks
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.mesh import use_mesh
from nemoe_jax.utils.progress import progress_bar
from train.data.loader import Corpus, open_corpus, source_files, stacked
from train.data.packing import Batch, Packed
from train.data.teacher_cache import ROWS, TeacherRows, check_meta, crc, open_shard, shard_path, write_shard
from train.recipe import Phase, Recipe
from train.run.prepare import recipe_mesh, resolve
from train.step.batch_sharding import place_whole

Predict = Callable[[Batch], tuple[np.ndarray, np.ndarray]]  # ids and log-probabilities (B, T, K)


def cache_teacher(recipe: Recipe) -> dict[str, Any]:
    """Makes what `distill.offline` names of each phase, or what is missing of it; returns the figures.

    Raises:
        UserError: no phase names one, or what is there was made otherwise.
    """
    inputs = resolve(recipe)
    mesh = recipe_mesh(recipe, inputs.config)
    figures = {"rows": 0, "rows_kept": 0, "targets": 0, "bytes": 0}
    phases = [phase for phase in recipe.phases if phase.distill and phase.distill.offline]
    if not phases:
        raise UserError("distill.offline: expected a directory to write to")
    for phase in phases:
        assert phase.distill
        data = phase.data
        corpus = open_corpus(
            data.train, data, inputs.tokenizer, inputs.config.vocab, exclude=source_files(data.held_out)
        )
        directory = offline_directory(phase)
        check_meta(directory, meta_of(recipe, phase), create=jax.process_index() == 0)
        with use_mesh(mesh):
            config, params = pretrained.load_pretrained(
                phase.distill.teacher, mesh=mesh, dtype=recipe.dtype, progress=True
            )
            places = NamedSharding(mesh, PartitionSpec()) if mesh else None
            compute = jax.jit(
                functools.partial(predictions, config, phase.distill.top_k, phase.distill.temperature),
                out_shardings=places,
            )

            def predict(batch: Batch, compute: Any = compute, params: Any = params) -> tuple[np.ndarray, np.ndarray]:
                return jax.device_get(compute(params, place_whole(batch, mesh)))

            visited = corpus.visited(data.batch_size, phase.seed, phase.steps)
            for source, (packed, rows) in enumerate(zip(corpus.packed, visited, strict=True)):
                assert isinstance(packed, Packed)
                _cache_source(packed, rows, directory, source, data.microbatch_size, config.vocab, predict, figures)
    return figures


def offline_directory(phase: Phase) -> Path:
    """Where a phase's predictions are."""
    assert phase.distill and phase.distill.offline
    return phase.distill.offline / phase.name


def meta_of(recipe: Recipe, phase: Phase) -> dict[str, Any]:
    """What a phase's predictions depend on, beside the text."""
    distill = phase.distill
    assert distill
    return {
        "teacher": weights_fingerprint(Checkpoint(distill.teacher)),
        "top_k": distill.top_k,
        "temperature": distill.temperature,
        "sequence_length": phase.data.sequence_length,
        "dtype": recipe.dtype,
    }


def with_predictions(recipe: Recipe, phase: Phase, corpus: Corpus) -> None:
    """Puts a cached teacher's predictions beside the corpus' rows.

    Raises:
        UserError: they are missing, or made otherwise.
    """
    assert phase.distill
    directory = offline_directory(phase)
    check_meta(directory, meta_of(recipe, phase))
    visited = corpus.visited(phase.data.batch_size, phase.seed, phase.steps)
    corpus.packed = [
        TeacherRows(packed, directory, source, rows, phase.distill.top_k)  # type: ignore[arg-type, misc]
        for source, (packed, rows) in enumerate(zip(corpus.packed, visited, strict=True))
    ]


def predictions(
    config: ModelConfig, top_k: int, temperature: float, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens after each token and their log-probabilities, (B, T, K) int32 and float16."""
    x_BTD = transformer.hidden_states(
        config, params, batch.inputs, positions=batch.positions, segments=batch.segments
    ).x_BTD
    parts = num_chunks(x_BTD.shape[1], max(CHUNK // len(x_BTD), 1))
    chunks = jnp.moveaxis(x_BTD.reshape(len(x_BTD), parts, -1, x_BTD.shape[-1]), 1, 0)

    def of_chunk(x_BCD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs = jax.nn.log_softmax(transformer.logits(config, params, x_BCD) / temperature)
        values, ids = jax.lax.top_k(logprobs, top_k)
        return ids, values.astype(jnp.float16)

    ids, values = (jnp.moveaxis(array, 0, 1) for array in jax.lax.map(of_chunk, chunks))
    shape = (*x_BTD.shape[:2], top_k)
    return ids.reshape(shape), values.reshape(shape)


CHUNK = 1024  # tokens whose logits are in memory at once


def _cache_source(
    packed: Packed,
    visited: Sequence[int],
    directory: Path,
    source: int,
    batch_size: int,
    vocab: int,
    predict: Predict,
    figures: dict[str, int],
) -> None:
    """Writes the shards of a source that are missing or of other rows."""
    kind = np.uint16 if vocab <= 1 << 16 else np.uint32
    with progress_bar() as bar:
        task = bar.add_task(f"teacher {source}", total=len(visited))
        for number in sorted({row // ROWS for row in visited}):
            rows = [row for row in visited if row // ROWS == number]
            path = shard_path(directory, source, number)
            if not _is_kept(path, packed, rows):
                made = []
                for first in range(0, len(rows), batch_size):
                    chosen = rows[first : first + batch_size]
                    batch = [packed[row] for row in chosen]
                    ids, logprobs = predict(stacked(batch + batch[-1:] * (batch_size - len(batch))))
                    for at, row in enumerate(batch):
                        counts = row.mask > 0
                        made.append((crc(row), ids[at][counts].astype(kind), logprobs[at][counts]))
                        figures["targets"] += int(counts.sum())
                if jax.process_index() == 0:
                    write_shard(path, rows, made)
                figures["rows"] += len(rows)
            else:
                figures["rows_kept"] += len(rows)
            bar.update(task, advance=len(rows))
            if path.exists():
                figures["bytes"] += sum(file.stat().st_size for file in path.iterdir())


def _is_kept(path: Path, packed: Packed, rows: Sequence[int]) -> bool:
    shard = open_shard(path)
    if shard is None:
        return False
    sums = dict(zip(shard["rows"].tolist(), shard["crc"].tolist(), strict=True))
    return all(sums.get(row) == crc(packed[row]) for row in rows)
