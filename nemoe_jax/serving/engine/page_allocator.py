"""Which pages of the cache are free: the host's side of cache.py's pools, one for each part of the batch's rows."""

from nemoe_jax.kernels.attention.paged import PAGE


class PageAllocator:
    """Gives pages of one part's pool by number and takes them back; page 0 is nobody's.

    Args:
        pages: of the pool on each device, with page 0.
        cuts: among how many devices each row's pages are cut: each holds a page under every number given.
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

    def wanted(self, tokens: int) -> int:
        """How many numbers a row of so many tokens takes."""
        return -(-tokens // (PAGE * self.cuts))

    def take(self, tokens: int) -> list[int]:
        """Room for a row of so many tokens, which the caller has seen to be there."""
        wanted = self.wanted(tokens)
        assert wanted <= len(self)
        return [self._free.pop() for _ in range(wanted)]

    def give_back(self, pages: list[int]) -> None:
        """They are free again."""
        self._free += reversed(pages)
