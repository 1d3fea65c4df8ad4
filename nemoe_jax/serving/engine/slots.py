"""The batch's slots as the host knows them: which response has which, and what the device is told of them.

B slots, M pages of a sequence, E stop tokens.
"""

import dataclasses
import time
from typing import NamedTuple

import numpy as np

from nemoe_jax.inference.decode import DecodedTokens, Scores
from nemoe_jax.serving.engine.device import MOST_ENDS, Batch
from nemoe_jax.serving.engine.page_allocator import PageAllocator, PageKey, page_keys
from nemoe_jax.serving.engine.request import ScoredToken
from nemoe_jax.serving.engine.speculation import PromptLookup
from nemoe_jax.serving.engine.stream import ResponseStream

_LEAST = 16  # tokens for which a page is copied


@dataclasses.dataclass(eq=False)
class Slot:
    """A place in the batch, with the response that has it. First its prompt is prefilled, all but the last token."""

    number: int
    response: ResponseStream
    pages: list[int]
    prompt: np.ndarray
    adapter: int  # its number; -1 for none
    keys: list[PageKey]  # of the prompt's whole pages, for those that share them
    prefilled: int = 0  # tokens of the prompt that are in the cache
    cached: int = 0  # of them, those that were there before
    finite: bool = True  # no NaN was seen in its pages
    published: int = 0  # pages that others may share, the first ones
    copied: list[PageKey] = dataclasses.field(default_factory=list)  # pages of others that it has copies of
    decoding: bool = False  # its prompt is in the cache
    lookup: PromptLookup | None = None  # guesses its next tokens
    since: float = dataclasses.field(default_factory=time.monotonic)


class Slots:
    """Gives slots and pages to responses, and takes them back.

    Args:
        pools: the pages of each part of the slots.
        width: page numbers in a line of the page table.
        shared_tokens: prompts share whole multiples of so many tokens; None: nothing.
        partial_pages: prompts also share what was generated, and pages that begin alike.
    """

    def __init__(
        self,
        count: int,
        pools: list[PageAllocator],
        width: int,
        shared_tokens: int | None = None,
        partial_pages: bool = False,
    ):
        self.pools, self._shared_tokens, self._partial_pages = pools, shared_tokens, partial_pages
        self.taken: dict[int, Slot] = {}
        self._count, self._of_part = count, count // len(pools)
        self._batch_BN = Batch.idle(count + 1, width)  # the last one, -1, is idle for good
        self.batch = Batch.of(self._batch_BN)

    def __len__(self) -> int:
        return self._count

    @property
    def idle(self) -> int:
        """How many are free."""
        return len(self) - len(self.taken)

    def decoding(self) -> list[Slot]:
        """Those whose prompts are in the cache."""
        return [slot for slot in self.taken.values() if slot.decoding]

    def at(self, places: np.ndarray) -> np.ndarray:
        """What the device is told of the slots in those places, for `Batch.of`; -1: of an idle one."""
        return self._batch_BN[places]

    def assign(self, response: ResponseStream) -> Slot | None:
        """A slot for a response, in the part with the most pages of its prompt or else the most free ones.

        None where there is no room now.
        """
        adapter = -1 if response.adapter is None else response.adapter.number
        prompt = np.array(response.request.prompt, np.int32)
        tokens = len(prompt) + response.request.max_new_tokens
        # the last token is read by the first step, which gives the logits behind it
        keys = [] if self._shared_tokens is None else page_keys(prompt[:-1], self.pools[0].size, _root(response))
        of_part = [self._whole(pool.published(keys)) for pool in self.pools]
        idle = [number for number in range(len(self)) if number not in self.taken]
        fitting = [number for number in idle if self._pool(number).has_room(tokens, of_part[self._part(number)])]
        if not fitting:
            return None
        number = max(fitting, key=lambda number: (len(of_part[self._part(number)]), len(self._pool(number)), -number))
        shared = of_part[self._part(number)]
        slot = Slot(number, response, self._pool(number).allocate(tokens, shared), prompt, adapter, keys)
        self.taken[number] = slot
        self._set_table(slot)
        self._reused(slot, len(shared))
        return slot

    def reuse(self, slot: Slot) -> None:
        """Takes pages of the prompt that others have published since, instead of computing them."""
        pool, first = self._pool(slot.number), slot.prefilled // self.pools[0].size
        if not self._partial_pages and first * pool.size != slot.prefilled:
            return
        shared = self._whole(pool.published(slot.keys[first:]))
        if shared:
            own = slot.pages[first : first + len(shared)]
            pool.use(shared)
            slot.pages[first : first + len(shared)] = shared
            pool.free(own)
            self._set_table(slot)
            self._reused(slot, first + len(shared))

    def match(self, slot: Slot) -> tuple[PageKey, int] | None:
        """A page of others that begins as the slot's next page does, and with how many tokens; None: none is worth it.

        For `copy`, after `reuse`.
        """
        if not self._partial_pages:
            return None
        pool = self._pool(slot.number)
        first, held = divmod(slot.prefilled, pool.size)
        parent = slot.keys[first - 1].hash if first else _root(slot.response)
        found = pool.longest_match(parent, slot.prompt[first * pool.size : -1][: pool.size])
        return found if found is not None and found[1] >= held + _LEAST else None

    def copy(self, slot: Slot, key: PageKey, tokens: int) -> tuple[int, int]:
        """The slot has those tokens of a page of others from now on: which page is to be copied, and to which."""
        pool, first = self._pool(slot.number), slot.prefilled // self.pools[0].size
        [source] = pool.published([key])
        gained = first * pool.size + tokens - slot.prefilled
        slot.prefilled += gained
        slot.cached += gained
        slot.copied.append(key)
        return source, slot.pages[first]

    def publish(self, slot: Slot) -> None:
        """Whole pages of what is prefilled can be shared from now on."""
        if self._shared_tokens is not None:
            complete = slot.prefilled // self._shared_tokens * self._shared_tokens // self.pools[0].size
            self._publish(slot, min(complete, len(slot.keys)))

    def publish_response(self, slot: Slot) -> None:
        """The same for what was generated, and the last page: the next message of a chat comes behind it."""
        if self._partial_pages:
            held = int(self.batch.length_B[slot.number])
            tokens = [*slot.response.request.prompt, *(scored.token for scored in slot.response.tokens)][:held]
            slot.keys = page_keys(np.array(tokens, np.int32), self.pools[0].size, _root(slot.response), _LEAST)
            self._publish(slot, len(slot.keys))

    def withdraw(self, slot: Slot) -> None:
        """Something is wrong with the slot's pages: nobody else is to share them."""
        pool = self._pool(slot.number)
        for page in (*slot.pages, *(page for key in slot.copied for page in pool.published([key]))):
            pool.withdraw(page)

    def private_pages(self, slot: Slot) -> list[int]:
        """Pages that no other sequence has or can have."""
        return [page for page in slot.pages if self._pool(slot.number).is_private(page)]

    def _publish(self, slot: Slot, count: int) -> None:
        for number in range(slot.published, count):
            self._pool(slot.number).publish(slot.pages[number], slot.keys[number])
        slot.published = max(slot.published, count)

    def _whole(self, pages: list[int]) -> list[int]:
        """As many as can be shared."""
        unit = (self._shared_tokens or 1) // self.pools[0].size or 1
        return pages[: len(pages) // unit * unit]

    def _reused(self, slot: Slot, pages: int) -> None:
        """So many of the slot's pages, the first ones, are those of others."""
        slot.cached += pages * self.pools[0].size - slot.prefilled
        slot.prefilled, slot.published = pages * self.pools[0].size, pages

    def _set_table(self, slot: Slot) -> None:
        table = np.repeat(slot.pages, self.pools[0].cuts)
        self.batch.table_BM[slot.number, : len(table)] = table

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
        return self.pools[self._part(number)]

    def _part(self, number: int) -> int:
        return number // self._of_part


class SlotTokens(NamedTuple):
    """One slot's share of a block."""

    tokens: list[int]
    failed: bool
    scores: Scores | None  # (S,), (S, N) and (S, N)

    @classmethod
    def of(cls, block: DecodedTokens, place: int) -> "SlotTokens":
        tokens = block.tokens_SB[: int(block.num_generated_B[place]), place].tolist()
        scores = None if block.scores is None else Scores(*(array[:, place] for array in block.scores))
        return cls(tokens, bool(block.failed_B[place]), scores)

    def scored(self, top: int | None) -> list[ScoredToken]:
        """The tokens, with log-probabilities where `top` says so."""
        if top is None:
            return [ScoredToken(token) for token in self.tokens]
        assert self.scores is not None
        logprob_S, tokens_SN, logprobs_SN = self.scores
        return [
            ScoredToken(
                token,
                float(logprob_S[at]),
                tuple(zip(tokens_SN[at, :top].tolist(), logprobs_SN[at, :top].tolist(), strict=True)),
            )
            for at, token in enumerate(self.tokens)
        ]


def _root(response: ResponseStream) -> bytes:
    """Tells apart the pages that an adapter of one content, or none, has computed."""
    return b"" if response.adapter is None else response.adapter.key
