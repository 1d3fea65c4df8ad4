"""Which pages of the KV cache are free: the host's side of the page pools, one for each part of the batch's slots."""

from nemoe_jax.kernels.attention.paged import PAGE


class PageAllocator:
    """Allocates pages of one part's pool by number; page 0 is reserved as the null page.

    Args:
        pages: pages of the pool on each device, the null page included.
        cuts: among how many devices each sequence's pages are divided: each holds a page under every number.
    """

    def __init__(self, pages: int, cuts: int = 1):
        self.all, self.cuts = pages - 1, cuts
        self._free = list(range(pages - 1, 0, -1))

    def __len__(self) -> int:
        return len(self._free)

    @property
    def tokens(self) -> int:
        """Tokens for which there is room."""
        return len(self) * PAGE * self.cuts

    def pages_for(self, tokens: int) -> int:
        """How many pages a sequence of so many tokens takes."""
        return -(-tokens // (PAGE * self.cuts))

    def allocate(self, tokens: int) -> list[int]:
        """Pages for a sequence of so many tokens; the caller has checked that there are enough."""
        count = self.pages_for(tokens)
        assert count <= len(self)
        return [self._free.pop() for _ in range(count)]

    def free(self, pages: list[int]) -> None:
        """Returns pages to the pool."""
        self._free += reversed(pages)

    def reset(self) -> None:
        """All pages are free, as at the start."""
        self._free = list(range(self.all, 0, -1))
