"""The rows of the running batch as the host knows them: whose they are, and what the device is told of them.

B rows, M pages of a row, E stop tokens.
"""

import dataclasses

import numpy as np

from nemoe_jax.serving.engine.page_allocator import PageAllocator
from nemoe_jax.serving.engine.runner import MOST_ENDS, Batch
from nemoe_jax.serving.engine.stream import ResponseStream


@dataclasses.dataclass
class Slot:
    """A place in the batch that an answer has. First its prompt is read, all but the last token of it."""

    number: int
    answer: ResponseStream
    pages: list[int]
    prompt: np.ndarray
    adapter: int  # its number; -1 for none
    read: int = 0  # tokens of the prompt that are in the cache
    working: bool = False  # its prompt is read


class Slots:
    """Gives places and pages to answers, and takes them back.

    Args:
        free: the pages of each part of the rows.
        width: numbers in a row of the table.
    """

    def __init__(self, rows: int, free: list[PageAllocator], width: int):
        self.free = free
        self.taken: dict[int, Slot] = {}
        self._of_part = rows // len(free)
        zeros_B = np.zeros(rows, np.int32)
        self.batch = Batch(
            table_BM=np.zeros((rows, width), np.int32),
            length_B=zeros_B.copy(),
            next_B=zeros_B.copy(),
            step_B=zeros_B.copy(),
            remaining_B=zeros_B.copy(),
            stop_BE=np.full((rows, MOST_ENDS), -1, np.int32),
            adapter_B=zeros_B - 1,
        )

    def __len__(self) -> int:
        return len(self.batch.remaining_B)

    @property
    def idle(self) -> int:
        """How many nobody has."""
        return len(self) - len(self.taken)

    def working(self) -> list[Slot]:
        """Those that make tokens."""
        return [row for row in self.taken.values() if row.working]

    def join(self, answer: ResponseStream, adapter: int) -> Slot | None:
        """A place for an answer, in the part with the most free pages; None where there is none now."""
        tokens = len(answer.request.prompt) + answer.request.max_new_tokens
        idle = [number for number in range(len(self)) if number not in self.taken]
        number = max(idle, key=lambda number: (len(self._pool(number)), -number), default=None)
        if number is None or self._pool(number).wanted(tokens) > len(self._pool(number)):
            return None
        pool = self._pool(number)
        row = Slot(number, answer, pool.take(tokens), np.array(answer.request.prompt, np.int32), adapter)
        self.taken[number] = row
        table = np.repeat(row.pages, pool.cuts)
        self.batch.table_BM[number, : len(table)] = table
        return row

    def work(self, row: Slot, ends: list[int]) -> None:
        """The row's prompt is read but for its last token: from now on it makes tokens."""
        number, batch = row.number, self.batch
        row.working = True
        batch.length_B[number], batch.next_B[number] = row.read, row.prompt[-1]
        batch.step_B[number], batch.remaining_B[number] = 0, row.answer.request.max_new_tokens
        batch.stop_BE[number, : len(ends[:MOST_ENDS])] = ends[:MOST_ENDS]
        batch.adapter_B[number] = row.adapter

    def count(self, row: Slot, tokens: list[int]) -> None:
        """The row made tokens."""
        self.batch.length_B[row.number] += len(tokens)
        self.batch.step_B[row.number] += len(tokens)
        self.batch.remaining_B[row.number] -= len(tokens)
        self.batch.next_B[row.number] = tokens[-1]

    def leave(self, row: Slot) -> None:
        """The row's place and pages are free again."""
        number, batch = row.number, self.batch
        del self.taken[number]
        self._pool(number).give_back(row.pages)
        batch.table_BM[number] = batch.length_B[number] = batch.remaining_B[number] = 0
        batch.stop_BE[number] = batch.adapter_B[number] = -1

    def _pool(self, number: int) -> PageAllocator:
        return self.free[number // self._of_part]
