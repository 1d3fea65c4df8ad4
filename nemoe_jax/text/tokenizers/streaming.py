"""Text from tokens as they come."""

from typing import SupportsIndex

from nemoe_jax.text.tokenizers.base import Tokenizer


class StreamDecoder:
    """Turns ids into text one by one, holding back the bytes of an unfinished character.

    The pieces that `push` and `flush` return join to `tokenizer.decode(all ids)`. An id's text depends on its
    neighbors (a leading space, half a character), so a short window of ids is decoded anew at each step, and only
    what the window's text has gained is returned. An unfinished character has at most three bytes and shows as one to
    three U+FFFD at the end, which are held back until something else follows or more ids came than it can have.
    (Where a decoder replaces a whole run of bytes for one bad byte, what was returned before it stays.)
    """

    WINDOW = 8
    UNFINISHED = 3  # bytes

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self.tokenizer = tokenizer
        self.skip_special = skip_special
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text already returned
        self._held = 0  # ids since the text last ended in a whole character

    def push(self, *tokens: SupportsIndex) -> str:
        """The text that these ids complete; empty while a character is unfinished."""
        if not tokens:
            return ""
        self._window += [token.__index__() for token in tokens]
        text = self._text(self._window)
        broken = len(text) - len(text.rstrip("\ufffd"))
        if broken and len(tokens) > 1:  # whole characters before it may only show one by one
            del self._window[-len(tokens) :]
            return "".join(map(self.push, tokens))
        self._held = self._held + 1 if broken else 0
        stable = len(text) - (broken if self._held <= self.UNFINISHED else min(broken, self.UNFINISHED))
        gained = text[self._shown : stable]
        self._shown = max(self._shown, stable)
        if not broken and len(self._window) > 2 * self.WINDOW:
            self._shorten(text)
        return gained

    def flush(self) -> str:
        """What was held back; an unfinished character comes as U+FFFD. The decoder is then as new."""
        rest = self._text(self._window)[self._shown :]
        self._window, self._shown, self._held = [], 0, 0
        return rest

    def _shorten(self, text: str) -> None:
        """Forgets old ids, cutting where no character is cut and some text remains for the next id to follow."""
        for keep in range(self.WINDOW, self.WINDOW + self.UNFINISHED + 1):
            tail = self._text(self._window[-keep:])
            if tail and text.endswith(tail):
                self._window, self._shown = self._window[-keep:], len(tail)
                return

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, self.skip_special)
