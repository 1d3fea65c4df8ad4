"""Finds the texts that end an answer while it streams by, however it is cut into pieces.

What may be the beginning of a stop text is held back until more of the answer decides, so that no part of one is ever
shown. The stop text that begins first ends the answer, as if `str.find` had looked through the whole.
"""

from collections.abc import Sequence

from nemoe_jax.errors import UserError


class StopStrings:
    """Lets an answer through up to the first stop text, which is then in `found`.

    Raises:
        UserError: a stop that is no text, or an empty one.
    """

    def __init__(self, stops: Sequence[str]):
        texts = [stops] if isinstance(stops, str) else stops
        wrong = [stop for stop in texts if not isinstance(stop, str) or not stop]
        if wrong:
            raise UserError(f"stop: expected texts that are not empty, got {wrong[0]!r}")
        self.found: str | None = None
        self._stops = sorted(texts, key=len)  # of those that begin at one place, the shortest
        self._held = ""

    def push(self, piece: str) -> str:
        """What can be shown now that this has come; nothing any more once a stop text is found."""
        return self._next(self._held + piece, last=False)

    def flush(self) -> str:
        """What was held back, as the answer ends; a stop text may be found in it all the same."""
        return self._next(self._held, last=True)

    def _next(self, held: str, last: bool) -> str:
        if self.found is not None:
            return ""
        places = ((held.find(stop), stop) for stop in self._stops)
        at, stop = min(
            (place for place in places if place[0] >= 0), key=lambda place: place[0], default=(len(held), None)
        )
        begun = len(held) if last else self._begun(held)
        end = min(at, begun)
        self.found = stop if at == end else None
        self._held = held[end:]
        return held[:end]

    def _begun(self, held: str) -> int:
        """Where the first stop text begins of which the text may hold the beginning; its end where there is none."""
        longest = len(self._stops[-1]) - 1 if self._stops else 0
        starts = range(max(0, len(held) - longest), len(held))
        return next((at for at in starts if any(stop.startswith(held[at:]) for stop in self._stops)), len(held))
