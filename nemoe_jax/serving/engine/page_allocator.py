"""Which pages of the KV cache are free or shared: the host's side of the page pools, one for each part of the slots.

A page that holds tokens of which the keys and values are known to be complete is published under a key, a hash of its
tokens and of all before them (and of the adapter that computed them): other sequences that begin alike take it instead
of computing it again. Shared pages are counted by the sequences that use them. Those that no sequence uses stay until
room is needed; then the least recently used go first, of one sequence the last.

Where sequences part within a page, the page that begins alike for longest can be copied (SGLang's radix cache, arXiv
2312.07104, shares single tokens without a copy; its pages have one token).
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from nemoe_jax.kernels.attention.paged import PAGE

_COMPARED = 256  # pages, the latest ones


class PageKey(NamedTuple):
    """What a page holds."""

    hash: bytes  # of its tokens and of all before them
    parent: bytes  # of all before them; of the first page: what tells apart who computed them
    tokens: bytes  # int32


def page_keys(tokens: np.ndarray, size: int, parent: bytes, least: int | None = None) -> list[PageKey]:
    """The key of each page of `size` tokens.

    Args:
        parent: tells apart what computed them.
        least: the last page counts from so many tokens on; by default it has to be whole.
    """
    keys = []
    for first in range(0, len(tokens) - (least or size) + 1, size):
        page = np.ascontiguousarray(tokens[first : first + size], np.int32).tobytes()
        keys.append(PageKey(hashlib.blake2b(parent + page, digest_size=16).digest(), parent, page))
        parent = keys[-1].hash
    return keys


class PageAllocator:
    """Allocates pages of one part's pool by number; page 0 is reserved as the null page.

    Args:
        pages: pages of the pool on each device, the null page included.
        cuts: among how many devices each sequence's pages are divided: each holds a page under every number.
    """

    def __init__(self, pages: int, cuts: int = 1):
        self.all, self.cuts = pages - 1, cuts
        self.reset()

    def reset(self) -> None:
        """All pages are free, as at the start."""
        self._free = list(range(self.all, 0, -1))
        self._users: Counter[int] = Counter()  # sequences that use a page
        self._page_of: dict[PageKey, int] = {}
        self._key_of: dict[int, PageKey] = {}
        self._behind: dict[bytes, dict[int, None]] = {}  # published pages by what is before them, the latest one last
        self._unused: OrderedDict[int, None] = OrderedDict()  # published, used by none; the least recently used first

    def __len__(self) -> int:
        """How many can be allocated."""
        return len(self._free) + len(self._unused)

    @property
    def size(self) -> int:
        """Tokens of a page, on all its devices."""
        return PAGE * self.cuts

    @property
    def tokens(self) -> int:
        """Tokens for which there is room."""
        return len(self) * self.size

    def pages_for(self, tokens: int) -> int:
        """How many pages a sequence of so many tokens takes."""
        return -(-tokens // self.size)

    def published(self, keys: Iterable[PageKey]) -> list[int]:
        """The pages of the first keys, up to one that is not there."""
        pages = []
        for key in keys:
            if key not in self._page_of:
                break
            pages.append(self._page_of[key])
        return pages

    def longest_match(self, parent: bytes, tokens: np.ndarray) -> tuple[PageKey, int] | None:
        """The published page behind that parent that begins with most of the tokens, and with how many of them."""
        best = None
        for page in islice(reversed(self._behind.get(parent, {})), _COMPARED):
            held = np.frombuffer(self._key_of[page].tokens, np.int32)[: len(tokens)]
            differs = held != tokens[: len(held)]
            count = int(differs.argmax()) if differs.any() else len(held)
            if count > (best[1] if best else 0):
                best = self._key_of[page], count
        return best

    def has_room(self, tokens: int, shared: Sequence[int] = ()) -> bool:
        """Whether a sequence of so many tokens that begins with those published pages can have its pages now."""
        return self.pages_for(tokens) - len(shared) <= len(self) - sum(page in self._unused for page in shared)

    def allocate(self, tokens: int, shared: Sequence[int] = ()) -> list[int]:
        """Pages for a sequence that begins with those published ones; the caller has checked that there is room."""
        assert self.has_room(tokens, shared)
        self.use(shared)
        own = [self._take() for _ in range(self.pages_for(tokens) - len(shared))]
        return [*shared, *own]

    def use(self, shared: Sequence[int]) -> None:
        """One more sequence uses these published pages."""
        for page in shared:
            self._users[page] += 1
            self._unused.pop(page, None)

    def free(self, pages: Sequence[int]) -> None:
        """A sequence no longer uses these pages."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] > 0:
                continue
            del self._users[page]
            if page in self._key_of:
                self._unused[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int, key: PageKey) -> None:
        """Nothing more is written to the page: others may share it, if they have no such page already."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key
            self._behind.setdefault(key.parent, {})[page] = None

    def withdraw(self, page: int) -> None:
        """No further sequence may share the page."""
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key], self._behind[key.parent][page]
            if not self._behind[key.parent]:
                del self._behind[key.parent]

    def is_private(self, page: int) -> bool:
        """Whether one sequence alone uses the page, and no other can come to it."""
        return self._users[page] == 1 and page not in self._key_of

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            self.withdraw(page)
        self._users[page] = 1
        return page
