"""An answer while it is made: what whoever asked holds of it, and what the engine tells it."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from nemoe_jax.serving.engine.request import Request, RequestOutput, ScoredToken
from nemoe_jax.serving.engine.stop_strings import StopStrings
from nemoe_jax.text.tokenizers.base import Tokenizer
from nemoe_jax.text.tokenizers.streaming import StreamDecoder

_log = logging.getLogger(__name__)


class ResponseStream:
    """Iterate over it for its pieces as they come, or wait for its `result`.

    Where a function takes the pieces (`on_piece`, called in the engine's thread), there is nothing to iterate over.

    text, tokens: so far; finish_reason, error: those of the last piece, None before.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        ends: frozenset[int],
        on_piece: Callable[[RequestOutput], None] | None,
        wake: Callable[[], None],
    ):
        self.request = request
        self.text = ""
        self.tokens: list[ScoredToken] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.cancelled = False
        self._ends = ends
        self._decoder, self._stops = StreamDecoder(tokenizer), StopStrings(request.stop)
        self._pieces: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        self._on_piece = on_piece or self._pieces.put
        self._iterable = on_piece is None
        self._wake = wake
        self._done = threading.Event()

    def __iter__(self) -> Iterator[RequestOutput]:
        if not self._iterable:
            raise TypeError("the answer's pieces go to on_piece")
        while True:
            piece = self._pieces.get()
            yield piece
            if piece.finish_reason is not None:
                self._pieces.put(piece)  # whoever iterates again finds the end
                return

    def cancel(self) -> None:
        """Ends the answer at the engine's next turn; from any thread, and as often as you like."""
        self.cancelled = True
        self._wake()

    def result(self, timeout: float | None = None) -> str:
        """The whole text, once it is there. Raises TimeoutError after so many seconds."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} seconds")
        return self.text

    def take(self, tokens: Sequence[ScoredToken]) -> RequestOutput:
        """More tokens, up to what ends the answer: the piece to `show`. For the engine."""
        shown, used, finish = "", [], None
        for token in tokens:
            used.append(token)
            if token.token in self._ends:
                finish = "stop"
            else:
                shown += self._stops.push(self._decoder.push(token.token))
                if self._stops.found is not None:
                    finish = "stop"
                elif len(self.tokens) + len(used) == self.request.max_new_tokens:
                    finish = "length"
            if finish is not None:
                break
        self.tokens += used
        if finish is None:
            return RequestOutput(shown, tuple(used))
        rest, finish = self._rest(finish)
        return RequestOutput(shown + rest, tuple(used), finish)

    def end(self, finish: str, error: str | None = None) -> None:
        """Shows the last piece: the answer ends before it is complete. For the engine."""
        rest, _ = self._rest(finish)
        self.show(RequestOutput(rest, (), finish, error))

    def show(self, piece: RequestOutput) -> None:
        """Hands a piece to whoever asked. For the engine."""
        self.text += piece.text
        self.finish_reason, self.error = piece.finish_reason, piece.error
        try:
            self._on_piece(piece)
        except Exception:
            _log.exception("nobody takes the answer's pieces: it is cancelled")
            self.cancelled, self._on_piece = True, lambda piece: None
        if piece.finish_reason is not None:
            self._done.set()

    def _rest(self, finish: str) -> tuple[str, str]:
        """What was held back of the text, and why the answer ends: a stop text may have been in it."""
        if self._stops.found is not None:
            return "", finish
        rest = self._stops.push(self._decoder.flush()) + self._stops.flush()
        return rest, "stop" if self._stops.found is not None and finish == "length" else finish
