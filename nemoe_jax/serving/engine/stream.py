"""A streaming response: the client-side handle of a running request, and the engine's side of it."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from nemoe_jax.adapters.loaded import LoadedAdapter
from nemoe_jax.serving.engine.request import Request, RequestOutput, ScoredToken
from nemoe_jax.serving.engine.stop_strings import StopStrings
from nemoe_jax.text.tokenizers.base import Tokenizer
from nemoe_jax.text.tokenizers.streaming import StreamDecoder

_log = logging.getLogger(__name__)


class ResponseStream:
    """Iterate over it for its outputs as they come, or wait for its `result`.

    Where a callback takes the outputs (`on_output`, called in the engine's thread), there is nothing to iterate over.

    text, tokens: so far; cached_tokens: of the prompt, those that were in the cache already; finish_reason, error:
        those of the last output, None before.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        end_tokens: frozenset[int],
        on_output: Callable[[RequestOutput], None] | None,
        wake: Callable[[], None],
    ):
        self.request = request
        self.text = ""
        self.tokens: list[ScoredToken] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.adapter: LoadedAdapter | None = None  # the request's
        self.cancelled = False
        self.cached_tokens = 0  # of the prompt, known with the first output
        self.prompt_scores: tuple[ScoredToken, ...] = ()  # for the first output
        self.finished = False  # the last output was given
        self._end_tokens = end_tokens
        self._decoder, self._stops = StreamDecoder(tokenizer), StopStrings(request.stop)
        self._outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        self._on_output = on_output or self._outputs.put
        self._iterable = on_output is None
        self._wake = wake
        self._done = threading.Event()

    def __iter__(self) -> Iterator[RequestOutput]:
        if not self._iterable:
            raise TypeError("the response's outputs go to on_output")
        while True:
            output = self._outputs.get()
            yield output
            if output.finish_reason is not None:
                self._outputs.put(output)  # iterating again finds the end
                return

    def cancel(self) -> None:
        """Ends the response at the engine's next step; from any thread, any number of times."""
        self.cancelled = True
        self._wake()

    def result(self, timeout: float | None = None) -> str:
        """The whole text, once it is complete.

        Raises:
            TimeoutError: after so many seconds.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"no response within {timeout} seconds")
        return self.text

    def append(self, tokens: Sequence[ScoredToken]) -> RequestOutput:
        """Adds tokens up to what ends the response, and returns the output to `emit`. For the engine."""
        shown, used, finish = "", [], None
        unread: list[int] = []  # all at once where no string may end the response between them
        for token in tokens:
            used.append(token)
            if token.token in self._end_tokens:
                finish = "stop"
            else:
                unread.append(token.token)
                if self.request.stop:
                    shown += self._stops.push(self._decoder.push(*unread))
                    unread.clear()
                if self._stops.found is not None:
                    finish = "stop"
                elif len(self.tokens) + len(used) == self.request.max_new_tokens:
                    finish = "length"
            if finish is not None:
                break
        shown += self._decoder.push(*unread)
        self.tokens += used
        rest = ""
        if finish is not None:
            rest, finish = self._flush(finish)
        scores, self.prompt_scores = self.prompt_scores, ()
        return RequestOutput(shown + rest, tuple(used), finish, prompt=scores)

    def finish(self, reason: str, error: str | None = None) -> None:
        """Emits the last output of a response that ends before it is complete. For the engine; does not fail."""
        if self.finished:
            return
        try:
            rest, _ = self._flush(reason)
        except Exception:  # as where the tokenizer cannot decode what came
            _log.exception("what was held back of a response is lost")
            rest = ""
        self.emit(RequestOutput(rest, (), reason, error))

    def emit(self, output: RequestOutput) -> None:
        """Gives an output to the client; one that fails to take it is cancelled, and told of the end all the same."""
        last = output.finish_reason is not None
        self.text += output.text
        self.finish_reason, self.error = output.finish_reason, output.error
        for _ in range(2 if last else 1):
            try:
                self._on_output(output)
                break
            except BaseException:  # the client's code: not even its exit may end the engine's thread
                _log.exception("the client fails to take its response: cancelled")
                self.cancelled = True
        if last:
            self.finished = True
            self._done.set()

    def _flush(self, finish: str) -> tuple[str, str]:
        """The text that was held back, and the finish reason: a stop string may have been in it."""
        if self._stops.found is not None:
            return "", finish
        rest = self._stops.push(self._decoder.flush()) + self._stops.flush()
        return rest, "stop" if self._stops.found is not None and finish == "length" else finish
