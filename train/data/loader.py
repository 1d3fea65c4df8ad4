"""Training batches: sources → tokens → packed rows → a seeded, endless mixture that any process can enter anywhere.

    corpus = open_corpus(recipe.data.train, recipe.data, tokenizer, vocab)
    batches = corpus.iterator(batch_size=16, seed=0)
    next(batches)                                 # Batch of arrays (16, T)
    batches.set_state(state)                      # of an earlier batches.get_state(), which JSON can hold

Each source's rows are shuffled anew in every epoch, and sources are mixed in fixed shares, by Grain. Element n of that
mixture depends on seed and n alone, and step s takes elements s · B … s · B + B: so the batches are the same whatever
the threads, the processes or the interruptions.

Letters: B rows of a batch, T tokens of a row.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from nemoe_jax.errors import UserError
from nemoe_jax.text.data.sources import find_files
from nemoe_jax.text.tokenizers.load import Tokenizer
from train.data.packing import Batch, Figures, Packed
from train.data.tokenize_documents import tokenize_source
from train.recipe import Data, Source

__all__ = ["Batch", "Corpus", "Figures", "open_corpus", "source_files"]

THREADS = 4
STEPS_AHEAD = 8


def open_corpus(
    sources: Sequence[Source],
    data: Data,
    tokenizer: Tokenizer,
    vocab: int,
    name: str = "data.train",
    exclude: Iterable[Path] = (),
) -> "Corpus":
    """Tokenizes and packs sources, or takes their tokens from the cache.

    Args:
        vocab: rows of the embedding that the tokens are for.
        name: the recipe's key of the sources, for errors.
        exclude: files that are left out, such as `source_files(data.held_out)`.

    Raises:
        UserError: a source that is missing, empty or malformed (see `tokenize_source`), or weights for some only.
    """
    weighted = [source.weight for source in sources if source.weight is not None]
    if weighted and len(weighted) != len(sources):
        raise UserError(
            f"{name}: weight: expected one for every source or for none, got {len(weighted)} of {len(sources)}"
        )
    exclude = list(exclude)
    packed = []
    for number, source in enumerate(sources):
        tokens = tokenize_source(source, data, tokenizer, vocab, f"{name}.{number}", exclude)
        packed.append(Packed(tokens, data.sequence_length))
    return Corpus(packed, weighted or [len(rows) for rows in packed])


def source_files(sources: Iterable[Source]) -> list[Path]:
    """The files of sources, those of data sets apart. Raises UserError where a pattern matches none."""
    return [file for source in sources if source.files for file in find_files(source.files)]


class Corpus:
    """The packed rows of sources, and the share of each in the training rows."""

    def __init__(self, packed: Sequence[Packed], weights: Sequence[float]):
        self.packed = list(packed)
        self.shares = [weight / sum(weights) for weight in weights]

    @property
    def figures(self) -> list[Figures]:
        """What became of each source."""
        return [packed.figures for packed in self.packed]

    def iterator(
        self, batch_size: int, seed: int, rows: Sequence[int] | None = None, threads: int = THREADS
    ) -> "grain.DatasetIterator[Batch]":
        """Batches of successive steps, without end.

        Args:
            batch_size: rows of a step, over all processes.
            rows: which of them this process reads; default: all. Others are not read.
            threads: that make batches ahead; they change nothing but the speed.

        Returns:
            An iterator over Batch (len(rows), T). Its `get_state()` can be held by JSON and given to `set_state`.
        """
        rows = range(batch_size) if rows is None else rows
        seeds = np.random.SeedSequence(seed).generate_state(len(self.packed)).tolist()
        shuffled = [
            grain.MapDataset.source(packed).seed(seed).shuffle().repeat()  # reshuffled in each epoch
            for packed, seed in zip(self.packed, seeds, strict=True)
        ]
        mixture = shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, self.shares)
        steps = grain.MapDataset.source(_Steps(mixture, batch_size, rows))
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=STEPS_AHEAD)))

    def held_out_batches(self, batch_size: int, batches: int) -> list[Batch]:
        """At most `batches` batches of evenly spaced rows, in order; the last is filled up with rows of padding."""
        places = [(packed, row) for packed in self.packed for row in range(len(packed))]
        wanted = min(batches * batch_size, len(places))
        chosen = [places[at] for at in np.linspace(0, len(places) - 1, wanted).round().astype(int)]
        result = []
        for first in range(0, wanted, batch_size):
            rows = [packed[row] for packed, row in chosen[first : first + batch_size]]
            filling = Batch(*map(np.zeros_like, rows[0]))
            result.append(_stacked(rows + [filling] * (batch_size - len(rows))))
        return result


class _Steps:
    """The mixture's elements by steps, of each step the rows that this process reads."""

    def __init__(self, mixture: Any, batch_size: int, rows: Sequence[int]):
        self.mixture, self.batch_size, self.rows = mixture, batch_size, rows

    def __len__(self) -> int:
        return len(self.mixture) // self.batch_size

    def __getitem__(self, step: int) -> Batch:
        return _stacked([self.mixture[step * self.batch_size + row] for row in self.rows])


def _stacked(rows: Sequence[Batch]) -> Batch:
    return Batch(*map(np.stack, zip(*rows, strict=True)))
