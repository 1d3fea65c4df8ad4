"""Speculation without a draft model: what followed the same few tokens before, in the prompt or the response, may
follow again (prompt look-up decoding; Saxena, 2023). One forward pass then checks several tokens instead of making one.

The tokens are those of decoding without it at any temperature, but for rounding: each position samples its own token,
by the random numbers of the request's seed and step, and what was guessed counts up to the first that differs.
"""

from collections.abc import Iterable, Sequence

TOKENS = 8  # of a forward pass that checks guesses, of all slots together: as many as the CPU's decode kernel takes
_KEY = 3  # tokens that must be the same
_RETRY = 64  # tokens after which a sequence that guesses badly is tried again
_SMOOTHING = 0.25
_FORGET = 0.99


class PromptLookup:
    """Guesses how one sequence goes on.

    accepted: how many guessed tokens were right of late, a moving average.
    """

    def __init__(self, tokens: Iterable[int]):
        self.accepted = float(TOKENS)
        self._tokens: list[int] = []
        self._following: dict[tuple[int, ...], int] = {}  # where the tokens begin that last came behind a key
        self._without = 0  # tokens since the last guess
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """The sequence has more tokens."""
        for token in tokens:
            at = len(self._tokens)
            if at >= _KEY:
                self._following[tuple(self._tokens[at - _KEY :])] = at
            self._tokens.append(token)
            self._without += 1
        if self._without >= _RETRY:
            self.accepted = max(self.accepted, 2.0)

    def guess(self, most: int) -> list[int]:
        """Up to so many tokens that may come next."""
        start = self._following.get(tuple(self._tokens[-_KEY:]))
        if start is None:
            return []
        period = len(self._tokens) - start
        return [self._tokens[start + number % period] for number in range(most)]

    def note(self, guessed: int, right: int) -> None:
        """So many guessed tokens were checked, and the first ones of them right."""
        self._without = 0
        # where all were right, more might have been
        self.accepted += _SMOOTHING * ((TOKENS if right == guessed else right) - self.accepted)


class Speculation:
    """Decides by measured times and acceptance whether a step checks guesses."""

    def __init__(self, batch_sizes: Sequence[int]):
        self.width = {size: TOKENS // size for size in batch_sizes if size <= TOKENS // 2}
        self.seconds: dict[int, float] = {}  # of a step that checks, by the size of the batch

    def pays(self, size: int, guesses: Sequence[tuple[PromptLookup, list[int]]], seconds_a_step: float) -> bool:
        """Whether checking these guesses is faster than decoding without, as far as is known."""
        if not any(guess for _, guess in guesses):
            return False
        expected = sum(1 + min(lookup.accepted, len(guess)) for lookup, guess in guesses)
        if expected / self.seconds.setdefault(size, seconds_a_step) > len(guesses) / seconds_a_step:
            return True
        self.seconds[size] *= _FORGET  # what was measured once, under whatever load, does not hold for good
        return False

    def measure(self, size: int, seconds: float) -> None:
        """A step that checked took so long; one that was compiled first took long, once."""
        self.seconds[size] = min(seconds, 2 * self.seconds[size])
