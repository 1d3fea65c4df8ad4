"""Speculation without a draft model: what followed the same few tokens before, in the prompt or the response, may
follow again (prompt look-up decoding; Saxena, 2023). One forward pass then checks several tokens instead of making one.

The tokens are those of decoding without it at any temperature, but for rounding: each position samples its own token,
by the random numbers of the request's seed and step, and what was guessed counts up to the first that differs.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

_KEY = 3  # tokens that must be the same where a source is found
_NEAR = 8  # tokens by which a replacement may be longer or shorter than what it replaces
_LONGEST = 32  # tokens that are compared
_LAST = 256  # places that are compared
_FOLLOWED = 0.1  # weight of a token in the share of those that came as in the source
_RETRY = 64  # tokens after which a sequence that guesses badly is tried again
_HOPED = 16  # tokens that a guess may be right in
_SMOOTHING = 0.25
_FORGET = 0.99


class PromptLookup:
    """Guesses how one sequence goes on.

    It follows a source, an earlier place of the sequence, beyond what is changed there: a copy with changes differs
    from its source in a few tokens, and where some of a line are new, the same three tokens are at the same place of
    many lines. After a change it looks for the place to go on nearby.

    accepted: how many guessed tokens were right of late, a moving average.
    """

    def __init__(self, tokens: Iterable[int]):
        self.accepted = float(_HOPED)
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], list[int]] = {}  # the places behind three tokens
        self._source: int | None = None  # the place of the next token there
        self._followed = 0.0  # how many of the last tokens came as in the source, a moving average
        self._without = 0  # tokens since the last guess
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """The sequence has more tokens."""
        for token in tokens:
            at = len(self._tokens)
            if self._source is not None:
                self._followed += _FOLLOWED * ((self._tokens[self._source] == token) - self._followed)
                self._source += 1
            if at >= _KEY:
                self._behind.setdefault(tuple(self._tokens[at - _KEY :]), []).append(at)
            self._tokens.append(token)
            self._without += 1
        if self._without >= _RETRY:
            self.accepted = max(self.accepted, 2.0)

    def guess(self, most: int) -> list[int]:
        """Up to so many tokens that may come next."""
        start = self._next_place()
        if start is None:
            return []
        period = len(self._tokens) - start
        return [self._tokens[start + number % period] for number in range(most)]

    def _next_place(self) -> int | None:
        source = self._source if self._followed > 0.5 else None
        if source is not None:
            near = range(max(source - _NEAR, 1), min(source + _NEAR + 1, len(self._tokens)))
            score, place = max((self._same_before(place) - abs(place - source) / 2, place) for place in near)
            if score > 0:
                self._source = place
                return place
        found = self._behind.get(tuple(self._tokens[-_KEY:]), [])[-_LAST:]
        if not found:
            return source
        place = max(found, key=lambda place: (self._same_before(place), place))
        if source is None:
            self._source, self._followed = place, 1.0
        return place

    def _same_before(self, place: int) -> int:
        """How many tokens before that place are those at the end."""
        tokens, length = self._tokens, 0
        while length < min(_LONGEST, place) and tokens[place - 1 - length] == tokens[-1 - length]:
            length += 1
        return length

    def note(self, guessed: int, right: int) -> None:
        """So many guessed tokens were checked, and the first ones of them right."""
        self._without = 0
        before, now = min(self.accepted, guessed), _HOPED if right == guessed else right  # all: more might have been
        self.accepted = before + _SMOOTHING * (now - before)


class Speculation:
    """Decides by measured times and acceptance whether a step checks guesses.

    Args:
        tokens: of a step that checks guesses, of all slots together.

    width: how many tokens of a slot are checked at a time, by the size of the batch.
    """

    def __init__(self, batch_sizes: Sequence[int], tokens: int):
        self.width = {size: tokens // size for size in batch_sizes if size <= tokens // 2}
        self.seconds: dict[int, float] = {}  # of a step that checks, by the size of the batch

    def guesses(
        self, places: Sequence[int], lookups: Mapping[int, tuple[PromptLookup, int]], seconds_a_step: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens that may come next in each place, (B, K), and how many, (B,); None where guessing does not pay.

        Args:
            places: the slot in each.
            lookups: the slots', with how many tokens each may still have.
        """
        size = len(places)
        most = self.width[size] - 1
        found = {slot: (lookup, lookup.guess(min(most, left - 1))) for slot, (lookup, left) in lookups.items()}
        if not self.pays(size, [*found.values()], seconds_a_step):
            return None
        guess_BK, count_B = np.zeros((size, most), np.int32), np.zeros(size, np.int32)
        for place, slot in enumerate(places):
            guess = found[slot][1] if slot in found else []
            guess_BK[place, : len(guess)], count_B[place] = guess, len(guess)
        return guess_BK, count_B

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
        self.seconds[size] += _SMOOTHING * (min(seconds, 4 * self.seconds[size]) - self.seconds[size])
