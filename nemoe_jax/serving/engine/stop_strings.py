"""Finds stop strings in a response while it streams, however it is cut into outputs.

What may be the beginning of a stop string is held back until more of the response decides, so that no part of one is
ever shown. The stop string that begins first ends the response, as if `str.find` had searched the whole.
"""

from collections.abc import Sequence

from nemoe_jax.errors import UserError


class StopStrings:
    """Passes a response on up to the first stop string, which is then in `found`.

    Raises:
        UserError: a stop string that is no string, or an empty one.
    """

    def __init__(self, stops: Sequence[str]):
        strings = [stops] if isinstance(stops, str) else stops
        wrong = [stop for stop in strings if not isinstance(stop, str) or not stop]
        if wrong:
            raise UserError(f"stop: expected strings that are not empty, got {wrong[0]!r}")
        self.found: str | None = None
        self._stops = sorted(strings, key=len)  # of those that begin at one place, the shortest
        self._held = ""

    def push(self, text: str) -> str:
        """What can be shown now that this has come; nothing any more once a stop string is found."""
        return self._next(self._held + text, last=False)

    def flush(self) -> str:
        """What was held back, as the response ends; a stop string may be found in it all the same."""
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
        """Where the first stop string begins of which the text may hold the beginning; its end where there is none."""
        longest = len(self._stops[-1]) - 1 if self._stops else 0
        starts = range(max(0, len(held) - longest), len(held))
        return next((at for at in starts if any(stop.startswith(held[at:]) for stop in self._stops)), len(held))
