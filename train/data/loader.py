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
from train.data.preference_packing import PackedPairs, PairBatch
from train.data.tokenize_documents import tokenize_source
from train.recipe import Data, Preference, Source

__all__ = ["Batch", "Corpus", "Figures", "PairBatch", "open_corpus", "source_files", "stacked"]

THREADS = 4
STEPS_AHEAD = 8


def open_corpus(
    sources: Sequence[Source],
    data: Data,
    tokenizer: Tokenizer,
    vocab: int,
    name: str = "data.train",
    exclude: Iterable[Path] = (),
    preference: Preference | None = None,
) -> "Corpus":
    """Tokenizes and packs sources, or takes their tokens from the cache.

    Args:
        vocab: rows of the embedding that the tokens are for.
        name: the recipe's key of the sources, for errors.
        exclude: files that are left out, such as `source_files(data.held_out)`.
        preference: for pairs of responses instead of documents.

    Raises:
        UserError: a source that is missing, empty or malformed (see `tokenize_source`), or weights for some only.
    """
    weighted = [source.weight for source in sources if source.weight is not None]
    if weighted and len(weighted) != len(sources):
        raise UserError(
            f"{name}: weight: expected one for every source or for none, got {len(weighted)} of {len(sources)}"
        )
    exclude = list(exclude)
    packed: list[Packed | PackedPairs] = []
    for number, source in enumerate(sources):
        key = f"{name}.{number}"
        if preference and source.format != "auto":
            raise UserError(f"{key}.format: expected auto for pairs of responses, got {source.format}")
        tokens = tokenize_source(source, data, tokenizer, vocab, key, exclude, pairs=preference is not None)
        length = data.sequence_length
        packed.append(PackedPairs(tokens, length, key, preference.loss) if preference else Packed(tokens, length))
    return Corpus(packed, weighted or [len(rows) for rows in packed])


def source_files(sources: Iterable[Source]) -> list[Path]:
    """The files of sources, those of data sets apart. Raises UserError where a pattern matches none."""
    return [file for source in sources if source.files for file in find_files(source.files)]


class Corpus:
    """The packed rows of sources, and the share of each in the training rows."""

    def __init__(self, packed: Sequence[Packed | PackedPairs], weights: Sequence[float]):
        self.packed = list(packed)
        self.pairs = [rows for rows in self.packed if isinstance(rows, PackedPairs)]
        for rows in self.pairs:
            rows.slots = max(other.slots for other in self.pairs)
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
        steps = grain.MapDataset.source(_Steps(self._mixture(self.packed, seed), batch_size, rows))
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=STEPS_AHEAD)))

    def visited(self, batch_size: int, seed: int, steps: int) -> list[list[int]]:
        """Of each source, the rows that so many steps take."""
        names = [[(number, row) for row in range(len(packed))] for number, packed in enumerate(self.packed)]
        mixture = self._mixture(names, seed)
        taken = {mixture[at] for at in range(min(steps * batch_size, len(mixture)))}
        return [sorted(row for source, row in taken if source == number) for number in range(len(self.packed))]

    def _mixture(self, sources: Sequence[Any], seed: int) -> Any:
        """The elements of sources, shuffled anew in each epoch, in their shares; without end."""
        seeds = np.random.SeedSequence(seed).generate_state(len(sources)).tolist()
        shuffled = [
            grain.MapDataset.source(source).seed(seed).shuffle().repeat()
            for source, seed in zip(sources, seeds, strict=True)
        ]
        return shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, self.shares)

    def held_out_batches(self, batch_size: int, batches: int) -> list[Any]:
        """At most `batches` batches of evenly spaced rows, in order; the last is filled up with rows of padding."""
        places = [(packed, row) for packed in self.packed for row in range(len(packed))]
        wanted = min(batches * batch_size, len(places))
        chosen = [places[at] for at in np.linspace(0, len(places) - 1, wanted).round().astype(int)]
        result = []
        for first in range(0, wanted, batch_size):
            rows = [packed[row] for packed, row in chosen[first : first + batch_size]]
            filling = type(rows[0])(*map(np.zeros_like, rows[0]))
            result.append(stacked(rows + [filling] * (batch_size - len(rows))))
        return result


class _Steps:
    """The mixture's elements by steps, of each step the rows that this process reads."""

    def __init__(self, mixture: Any, batch_size: int, rows: Sequence[int]):
        self.mixture, self.batch_size, self.rows = mixture, batch_size, rows

    def __len__(self) -> int:
        return len(self.mixture) // self.batch_size

    def __getitem__(self, step: int) -> Batch | PairBatch:
        return stacked([self.mixture[step * self.batch_size + row] for row in self.rows])


def stacked(rows: Sequence[Any]) -> Any:
    """Rows as a batch."""
    return type(rows[0])(*map(np.stack, zip(*rows, strict=True)))
