"""The batch's slots as the host knows them: which response has which, and what the device is told of them.

B slots, M pages of a sequence, E stop tokens.
"""

import dataclasses
import time

import numpy as np

from nemoe_jax.serving.engine.page_allocator import PageAllocator
from nemoe_jax.serving.engine.runner import MOST_ENDS, Batch
from nemoe_jax.serving.engine.stream import ResponseStream


@dataclasses.dataclass(eq=False)
class Slot:
    """A place in the batch, with the response that has it. First its prompt is prefilled, all but the last token."""

    number: int
    response: ResponseStream
    pages: list[int]
    prompt: np.ndarray
    adapter: int  # its number; -1 for none
    prefilled: int = 0  # tokens of the prompt that are in the cache
    decoding: bool = False  # its prompt is in the cache
    since: float = dataclasses.field(default_factory=time.monotonic)


class Slots:
    """Gives slots and pages to responses, and takes them back.

    Args:
        pools: the pages of each part of the slots.
        width: page numbers in a line of the page table.
    """

    def __init__(self, count: int, pools: list[PageAllocator], width: int):
        self.pools = pools
        self.taken: dict[int, Slot] = {}
        self._count, self._of_part = count, count // len(pools)
        zeros_B = np.zeros(count + 1, np.int32)  # the last one, -1, is idle for good
        self.batch = Batch(
            table_BM=np.zeros((count + 1, width), np.int32),
            length_B=zeros_B.copy(),
            next_B=zeros_B.copy(),
            step_B=zeros_B.copy(),
            remaining_B=zeros_B.copy(),
            stop_BE=np.full((count + 1, MOST_ENDS), -1, np.int32),
            adapter_B=zeros_B - 1,
        )

    def __len__(self) -> int:
        return self._count

    @property
    def idle(self) -> int:
        """How many are free."""
        return len(self) - len(self.taken)

    def decoding(self) -> list[Slot]:
        """Those whose prompts are in the cache."""
        return [slot for slot in self.taken.values() if slot.decoding]

    def at(self, places: np.ndarray) -> Batch:
        """What the device is told of the slots in those places; -1: of an idle one."""
        return Batch(*(array[places] for array in self.batch))

    def assign(self, response: ResponseStream, adapter: int) -> Slot | None:
        """A slot for a response, in the part with the most free pages; None where there is no room now."""
        tokens = len(response.request.prompt) + response.request.max_new_tokens
        idle = [number for number in range(len(self)) if number not in self.taken]
        number = max(idle, key=lambda number: (len(self._pool(number)), -number), default=None)
        if number is None or self._pool(number).pages_for(tokens) > len(self._pool(number)):
            return None
        pool = self._pool(number)
        slot = Slot(number, response, pool.allocate(tokens), np.array(response.request.prompt, np.int32), adapter)
        self.taken[number] = slot
        table = np.repeat(slot.pages, pool.cuts)
        self.batch.table_BM[number, : len(table)] = table
        return slot

    def start_decoding(self, slot: Slot, stop_tokens: list[int]) -> None:
        """The prompt is in the cache but for its last token: from now on the slot generates tokens."""
        number, batch = slot.number, self.batch
        slot.decoding = True
        batch.length_B[number], batch.next_B[number] = slot.prefilled, slot.prompt[-1]
        batch.step_B[number], batch.remaining_B[number] = 0, slot.response.request.max_new_tokens
        batch.stop_BE[number, : len(stop_tokens[:MOST_ENDS])] = stop_tokens[:MOST_ENDS]
        batch.adapter_B[number] = slot.adapter

    def advance(self, slot: Slot, tokens: list[int]) -> None:
        """The slot has generated tokens."""
        self.batch.length_B[slot.number] += len(tokens)
        self.batch.step_B[slot.number] += len(tokens)
        self.batch.remaining_B[slot.number] -= len(tokens)
        self.batch.next_B[slot.number] = tokens[-1]

    def release(self, slot: Slot) -> None:
        """The slot and its pages are free again."""
        del self.taken[slot.number]
        self._pool(slot.number).free(slot.pages)
        self._clear(slot.number)

    def reset(self) -> None:
        """All slots and pages are free, whatever state they were left in."""
        self.taken.clear()
        for pool in self.pools:
            pool.reset()
        self._clear(slice(None))

    def _clear(self, number: int | slice) -> None:
        batch = self.batch
        batch.table_BM[number] = batch.length_B[number] = batch.remaining_B[number] = 0
        batch.stop_BE[number] = batch.adapter_B[number] = -1

    def _pool(self, number: int) -> PageAllocator:
        return self.pools[number // self._of_part]
