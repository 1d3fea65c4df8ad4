"""The rows of the running batch as the host knows them: whose they are, and what the device is told of them.

B rows, M pages of a row, E stop tokens.
"""

import dataclasses

import numpy as np

from nemoe_jax.serving.live_answer import Answer
from nemoe_jax.serving.pages import FreePages
from nemoe_jax.serving.programs import MOST_ENDS


@dataclasses.dataclass
class Row:
    """A place in the batch that an answer has. First its prompt is read, all but the last token of it."""

    number: int
    answer: Answer
    pages: list[int]
    prompt: np.ndarray
    adapter: int  # its number; -1 for none
    read: int = 0  # tokens of the prompt that are in the cache
    working: bool = False  # its prompt is read


class Rows:
    """Gives places and pages to answers, and takes them back.

    Args:
        free: the pages of each part of the rows.
        width: numbers in a row of the table.
    """

    def __init__(self, rows: int, free: list[FreePages], width: int):
        self.free = free
        self.taken: dict[int, Row] = {}
        self.changed = True  # since the device was told
        self._of_part = rows // len(free)
        zeros_B = np.zeros(rows, np.int32)
        self.table_BM = np.zeros((rows, width), np.int32)
        self.length_B, self.next_B, self.step_B, self.left_B = (zeros_B.copy() for _ in range(4))
        self.stop_BE = np.full((rows, MOST_ENDS), -1, np.int32)
        self.adapter_B = np.full(rows, -1, np.int32)

    @property
    def idle(self) -> int:
        """How many nobody has."""
        return len(self.left_B) - len(self.taken)

    def working(self) -> list[Row]:
        """Those that make tokens."""
        return [row for row in self.taken.values() if row.working]

    def join(self, answer: Answer, adapter: int) -> Row | None:
        """A place for an answer, in the part with the most free pages; None where there is none now."""
        tokens = len(answer.request.prompt) + answer.request.max_new_tokens
        idle = [number for number in range(len(self.left_B)) if number not in self.taken]
        number = max(idle, key=lambda number: (len(self._pool(number)), -number), default=None)
        if number is None or self._pool(number).wanted(tokens) > len(self._pool(number)):
            return None
        pool = self._pool(number)
        row = Row(number, answer, pool.take(tokens), np.array(answer.request.prompt, np.int32), adapter)
        self.taken[number] = row
        table = np.repeat(row.pages, pool.cuts)
        self.table_BM[number] = 0
        self.table_BM[number, : len(table)] = table
        self.length_B[number] = self.step_B[number] = self.left_B[number] = 0
        return row

    def work(self, row: Row, ends: list[int]) -> None:
        """The row's prompt is read but for its last token: from now on it makes tokens."""
        number = row.number
        row.working = self.changed = True
        self.length_B[number], self.adapter_B[number] = row.read, row.adapter
        self.next_B[number], self.left_B[number] = row.prompt[-1], row.answer.request.max_new_tokens
        self.stop_BE[number] = -1
        self.stop_BE[number, : len(ends[:MOST_ENDS])] = ends[:MOST_ENDS]

    def count(self, row: Row, tokens: list[int]) -> None:
        """The row made tokens, as the device knows already."""
        number = row.number
        self.length_B[number] += len(tokens)
        self.step_B[number] += len(tokens)
        self.left_B[number] -= len(tokens)
        self.next_B[number] = tokens[-1]

    def leave(self, row: Row) -> None:
        """The row's place and pages are free again."""
        number = row.number
        del self.taken[number]
        self._pool(number).give_back(row.pages)
        self.table_BM[number] = self.length_B[number] = self.left_B[number] = 0
        self.changed = True

    def _pool(self, number: int) -> FreePages:
        return self.free[number // self._of_part]
