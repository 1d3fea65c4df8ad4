"""Pairs of responses packed into rows of T tokens, each pair in one row.

An item is a prompt with its chosen response and the same with its rejected one, two segments; KTO adds a third, the
prompt with the next item's chosen response, which does not belong to it. Items stay whole and are put into rows by
best fit; one that is longer than a row is left out and counted.

The slots of a row are its segments in order: those of item i are i · G … i · G + G, with G segments to an item. A row
has as many slots as the fullest one of the corpus needs.

Letters: T tokens of a row, D documents (chosen and rejected in turn), I items, S slots of a row.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from nemoe_jax.errors import UserError
from train.data.packing import Batch, Figures, best_fit, empty_row
from train.data.token_cache import Tokens

RESPONSE, PROMPT = 1, 2  # in the mask: a response's target, and a prompt's that only the likelihood of the text counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairBatch(Batch):
    """Rows of packed pairs; the mask is RESPONSE, PROMPT, or 0 where the target does not count."""

    reference: Any  # (B, S) float32: the reference model's log p of each slot's response
    scores: Any  # (B, S) float32: of the responses, 0 where there is none
    items: Any  # (B,) int32: items in each row


class PackedPairs:
    """The rows of a source; `packed[i]` makes row i."""

    def __init__(self, tokens: Tokens, sequence_length: int, name: str, loss: str = "dpo"):
        """`name`: the recipe's key of the source, for errors. `loss`: as in the recipe."""
        self.tokens, self.sequence_length, self.loss = tokens, sequence_length, loss
        self.group = 3 if loss == "kto" else 2
        lengths_D = np.diff(tokens.offsets)
        self._prompts_D = np.array([self._prompt(document) for document in range(len(lengths_D))], np.int64)
        items = len(lengths_D) // 2
        lengths_I = lengths_D[0::2] + lengths_D[1::2]
        if loss == "kto":
            if items < 2:
                raise UserError(f"{name}: expected at least two pairs for preference.loss: kto, got {items}")
            lengths_I += self._prompts_D[0::2] + np.roll((lengths_D - self._prompts_D)[0::2], -1)
        kept = np.flatnonzero(lengths_I <= sequence_length)
        if not len(kept):
            raise UserError(
                f"{name}: no pair fits a row of {sequence_length} tokens; the shortest takes {lengths_I.min()} "
                "(data.sequence_length; chosen and rejected are in one row)"
            )
        rows_I, rows = best_fit(lengths_I[kept], sequence_length)
        self._items = kept[np.argsort(rows_I, kind="stable")]
        counts_R = np.bincount(rows_I, minlength=rows)
        self._starts = np.concatenate([[0], np.cumsum(counts_R)]).astype(np.int64)
        self.slots = self.group * int(counts_R.max())
        self.reference = np.zeros((rows, self.slots), np.float32)
        scores = tokens.figures.get("scores") or []
        if loss == "rpo" and (len(scores) < items or any(pair is None for pair in scores)):
            raise UserError(f"{name}: preference.loss: rpo: expected score_chosen and score_rejected in every row")
        self._scores = scores
        self.figures = Figures(
            documents=len(lengths_D),
            tokens=int(tokens.offsets[-1]),
            rows=rows,
            padding=1 - int(lengths_I[kept].sum()) / (rows * sequence_length),
            loss_tokens=int(sum((lengths_D - self._prompts_D)[shift::2][kept].sum() for shift in (0, 1))),
            truncated=items - len(kept),
            bad_rows=int(tokens.figures.get("bad_rows", 0)),
        )

    def __len__(self) -> int:
        return self.figures.rows

    def __getitem__(self, row: int) -> PairBatch:
        """Row `row`."""
        length, items = self.sequence_length, self._items[self._starts[row] : self._starts[row + 1]]
        reference, scores = (np.zeros(self.slots, np.float32) for _ in range(2))
        text = vars(empty_row(length))
        batch = PairBatch(**text, reference=reference, scores=scores, items=np.int32(len(items)))
        batch.reference[: self.reference.shape[1]] = self.reference[row]
        at = 0
        for place, item in enumerate(items):
            for slot, (ids_N, mask_N) in enumerate(self._segments(int(item)), place * self.group):
                here, targets = slice(at, at + len(ids_N)), slice(at, at + len(ids_N) - 1)
                batch.inputs[here] = ids_N
                batch.targets[targets], batch.mask[targets] = ids_N[1:], mask_N[1:]
                batch.segments[here] = slot + 1
                batch.positions[here] = np.arange(len(ids_N))
                at += len(ids_N)
            if self._scores and self._scores[item]:
                batch.scores[place * self.group : place * self.group + 2] = self._scores[item]
        return batch

    def _segments(self, item: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, mask) of an item's segments."""
        segments = []
        for document in (2 * item, 2 * item + 1):
            ids_N, mask_N = self._document(document)
            if self.loss == "orpo" and document == 2 * item:
                mask_N = np.where(mask_N == 0, PROMPT, mask_N)
            segments.append((ids_N, mask_N))
        if self.loss == "kto":
            asked, other = 2 * item, 2 * ((item + 1) % (len(self._prompts_D) // 2))
            prompt_N, _ = self._document(asked)
            ids_N, mask_N = self._document(other)
            before, after = self._prompts_D[asked], self._prompts_D[other]
            mismatched = np.concatenate([prompt_N[:before], ids_N[after:]])
            segments.append((mismatched, np.concatenate([np.zeros(before, np.float32), mask_N[after:]])))
        return segments

    def _document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        start, stop = (int(self.tokens.offsets[number + shift]) for shift in (0, 1))
        return np.asarray(self.tokens.tokens_N[start:stop]), self.tokens.mask_of(start, stop).astype(np.float32)

    def _prompt(self, number: int) -> int:
        """Tokens before a document's response."""
        start, stop = (int(self.tokens.offsets[number + shift]) for shift in (0, 1))
        return int(self.tokens.mask_of(start, stop).argmax())
