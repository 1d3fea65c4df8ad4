"""Documents packed into rows of T tokens.

Texts follow one another and are cut where a row ends; what is left goes on in the next row as a segment of its own.
Chats stay whole: they are put into rows by best fit, the longest first, and one that is longer than a row is cut at its
end. Segments are numbered from 1 in each row (0 is padding) and positions start from 0 in each, so no attention and no
target crosses a document's end: the last token of a document has no target.

A row is made when it is asked for, from the maps of the token cache; only where each document goes is computed before.

Letters: T tokens of a row, D documents, C chats, R rows.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from train.data.token_cache import Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of packed documents, arrays (B, T), of NumPy or JAX; or a single row, arrays (T,)."""

    inputs: Any  # int32 tokens
    targets: Any  # int32, the token after each; 0 where there is none
    mask: Any  # float32, 1 where the target counts
    segments: Any  # int32, documents numbered from 1; 0 is padding
    positions: Any  # int32, from 0 in each segment

    def __iter__(self) -> Iterator[Any]:
        """The arrays, in the order of the fields."""
        return iter(vars(self).values())


class Figures(NamedTuple):
    """What packing made of a source."""

    documents: int
    tokens: int  # of the documents
    rows: int
    padding: float  # share of the rows' places
    loss_tokens: int  # targets that count, in one pass over the rows
    truncated: int  # chats that were longer than a row
    bad_rows: int  # of the source, left out


def shortened(batch: Batch, length: int) -> Batch:
    """The same rows with a document's end after every `length` tokens, but for the targets, which stay.

    So attention reaches no farther, while shapes and the tokens that are learned are the same (arXiv 2503.15450).
    """
    places_T = np.arange(batch.inputs.shape[-1])
    begins = (batch.positions == 0) | (places_T % length == 0)
    first = np.maximum.accumulate(np.where(begins, places_T, 0), axis=-1)
    segments = np.where(batch.segments > 0, np.cumsum(begins, axis=-1), 0)
    return dataclasses.replace(batch, segments=segments.astype(np.int32), positions=(places_T - first).astype(np.int32))


def empty_row(length: int) -> Batch:
    """A row of nothing but padding."""
    return Batch(*(np.zeros(length, dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)))


class Piece(NamedTuple):
    """A stretch of tokens that a row holds as one segment."""

    start: int  # in the source's tokens
    stop: int
    end: int  # of its document


class Packed:
    """The rows of a source; `packed[i]` makes row i."""

    def __init__(self, tokens: Tokens, sequence_length: int):
        self.tokens, self.sequence_length = tokens, sequence_length
        lengths_D = np.diff(tokens.offsets)
        self._texts = np.flatnonzero(~tokens.chats_D)
        self._text_ends = np.cumsum(lengths_D[self._texts])  # where each ends in the stream of texts
        self._text_tokens = int(self._text_ends[-1]) if len(self._texts) else 0
        self._text_rows = -(-self._text_tokens // sequence_length)
        chats = np.flatnonzero(tokens.chats_D)
        rows_C, chat_rows = best_fit(np.minimum(lengths_D[chats], sequence_length), sequence_length)
        self._chats = chats[np.argsort(rows_C, kind="stable")]
        self._chat_starts = np.concatenate([[0], np.cumsum(np.bincount(rows_C, minlength=chat_rows))]).astype(np.int64)
        # a chat of T + 1 tokens loses nothing: its last token is a target only
        too_long = chats[lengths_D[chats] > sequence_length + 1]
        used = self._text_tokens + int(np.minimum(lengths_D[chats], sequence_length).sum())
        rows = self._text_rows + chat_rows
        self.figures = Figures(
            documents=len(lengths_D),
            tokens=int(tokens.offsets[-1]),
            rows=rows,
            padding=1 - used / max(rows * sequence_length, 1),
            loss_tokens=self._count_targets(too_long),
            truncated=len(too_long),
            bad_rows=int(tokens.figures.get("bad_rows", 0)),
        )

    def __len__(self) -> int:
        return self.figures.rows

    def __getitem__(self, row: int) -> Batch:
        """Row `row`, arrays (T,)."""
        batch = empty_row(self.sequence_length)
        at = 0
        for number, (start, stop, end) in enumerate(self._pieces(row), 1):
            here, targets = slice(at, at + stop - start), min(stop + 1, end) - start - 1
            batch.inputs[here] = self.tokens.tokens_N[start:stop]
            batch.targets[at : at + targets] = self.tokens.tokens_N[start + 1 : start + 1 + targets]
            batch.mask[at : at + targets] = self.tokens.mask_of(start + 1, start + 1 + targets)
            batch.segments[here] = number
            batch.positions[here] = np.arange(stop - start)
            at += stop - start
        return batch

    def _pieces(self, row: int) -> list[Piece]:
        if row >= self._text_rows:
            first, last = self._chat_starts[row - self._text_rows : row - self._text_rows + 2]
            starts, ends = (self.tokens.offsets[self._chats[first:last] + shift] for shift in (0, 1))
            stops = np.minimum(ends, starts + self.sequence_length)
            return [Piece(*map(int, piece)) for piece in zip(starts, stops, ends, strict=True)]
        pieces = []
        at, row_end = row * self.sequence_length, min((row + 1) * self.sequence_length, self._text_tokens)
        text = int(np.searchsorted(self._text_ends, at, side="right"))
        while at < row_end:
            stop, end = min(int(self._text_ends[text]), row_end), int(self.tokens.offsets[self._texts[text] + 1])
            shift = end - int(self._text_ends[text])  # from the stream of texts to the source's tokens
            pieces.append(Piece(at + shift, stop + shift, end))
            at, text = stop, text + 1
        return pieces

    def _count_targets(self, too_long: np.ndarray) -> int:
        """Tokens to be predicted: those that the mask names, but for first tokens and what is cut off."""
        tokens, offsets = self.tokens, self.tokens.offsets
        starts = offsets[:-1][np.diff(offsets) > 0]
        first = (tokens.mask[starts // 8] >> (7 - starts % 8).astype(np.uint8)) & 1  # packed from the highest bit on
        cut = [(offsets[chat] + self.sequence_length + 1, offsets[chat + 1]) for chat in too_long]
        lost = sum(int(tokens.mask_of(int(start), int(stop)).sum()) for start, stop in cut)
        return int(np.bitwise_count(tokens.mask).sum(dtype=np.int64)) - int(first.sum()) - lost


def best_fit(lengths_C: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Puts items into as few bins as best fit does: each, the longest first, into the fullest bin that takes it.

    Bins with the same room left are on one stack, and the bits of an integer tell which rooms there are, so that the
    smallest sufficient one is found by a shift: a million items take about a second.

    Args:
        lengths_C: lengths, 0 … capacity.

    Returns:
        The bin of each item, and the number of bins.
    """
    bins_C = np.zeros(len(lengths_C), np.int64)
    stacks: dict[int, list[int]] = {}
    rooms, bins = 0, 0
    order = np.argsort(-lengths_C, kind="stable")
    placed = []
    for length in lengths_C[order].tolist():
        found = rooms >> length
        if found:
            room = length + (found & -found).bit_length() - 1
            stack = stacks[room]
            number = stack.pop()
            if not stack:
                rooms ^= 1 << room
        else:
            room, number, bins = capacity, bins, bins + 1
        placed.append(number)
        left = room - length
        stacks.setdefault(left, []).append(number)
        rooms |= 1 << left
    bins_C[order] = placed
    return bins_C, bins
