"""How answers go out: whole, or as server-sent events; and that a client which goes away frees what it asked for."""

import asyncio
import contextlib
import dataclasses
import functools
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nemoe_jax.serving.api.api_keys import Caller
from nemoe_jax.serving.api.errors import ApiError, shutting_down
from nemoe_jax.serving.api.metrics import Metrics
from nemoe_jax.serving.api.middleware import add_access_log
from nemoe_jax.serving.api.requests import GenerationParams
from nemoe_jax.serving.api.responses import Usage
from nemoe_jax.serving.api.served_model import ServedModel
from nemoe_jax.serving.engine.engine import Engine
from nemoe_jax.serving.engine.request import Request as EngineRequest
from nemoe_jax.serving.engine.request import RequestOutput

DONE = "data: [DONE]\n\n"
LOOK_AFTER = 5  # seconds without an output, after which the responses are asked whether they still run
T = TypeVar("T")


class EngineStreams:
    """Answers of the engine to several requests: all are taken, or none.

    Whoever makes one sees to it that `cancel` is called in the end; that costs nothing where all are finished.

    Raises:
        UserError: a request that the engine cannot answer.
        Busy: its queue is full.
        ApiError: a limit of the caller's API key is reached.
    """

    def __init__(self, engine: Engine, requests: Sequence[EngineRequest], metrics: Metrics, caller: Caller):
        prompt_tokens = sum(len(request.prompt) for request in requests)
        caller.account.enter(len(requests), prompt_tokens)
        self._account, self._entered = caller.account, len(requests)
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, RequestOutput]] = asyncio.Queue()
        self._times = [_Times(metrics) for _ in requests]
        self._answers = []
        try:
            for index, request in enumerate(requests):
                own = dataclasses.replace(request, client=caller.name, priority=caller.priority)
                self._answers.append(engine.submit(own, functools.partial(self._take, index)))
        except BaseException:
            self.cancel()
            self._account.spend(-prompt_tokens)
            raise
        metrics.prompt_tokens.inc(prompt_tokens)

    def cancel(self) -> None:
        """Frees what the engine still holds for them."""
        for answer in self._answers:
            answer.cancel()
        self._account.leave(self._entered)
        self._entered = 0

    def cached_tokens(self, count: int) -> int:
        """Tokens of the prompts that were in the cache already; `count` responses each have one prompt."""
        return sum(answer.cached_tokens for answer in self._answers[::count])

    def _take(self, index: int, output: RequestOutput) -> None:
        """In the engine's thread."""
        try:
            self._times[index].note(output)
            self._account.spend(len(output.tokens))
        finally:  # whatever comes of the figures
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, output))

    async def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Pieces with the number of their answer, until all are finished; what has piled up comes as one piece.

        Raises:
            ApiError: the engine gave up on one of them.
        """
        left = set(range(len(self._answers)))
        while left:
            try:
                come = [await asyncio.wait_for(self._queue.get(), LOOK_AFTER)]
            except TimeoutError:
                if any(self._answers[index].finished for index in left) and self._queue.empty():
                    raise ApiError(500, "the end of a response was lost", code="engine_error") from None
                continue
            while not self._queue.empty():
                come.append(self._queue.get_nowait())
            joined: dict[int, RequestOutput] = {}
            for index, piece in come:
                if index not in joined:
                    joined[index] = piece
                elif joined[index].finish_reason is None:
                    joined[index] = _join(joined[index], piece)
            for index, piece in joined.items():
                if index not in left:  # told of its end twice, as the first time failed
                    continue
                if piece.finish_reason == "error":
                    raise ApiError(500, piece.error or "the engine failed", code="engine_error")
                if piece.finish_reason == "cancelled":
                    raise shutting_down()
                if piece.finish_reason is not None:
                    left.remove(index)
                yield index, piece


def new_id(kind: str) -> str:
    """A name for an answer."""
    return f"{kind}-{uuid.uuid4().hex}"


def as_json(body: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    """A whole response."""
    return Response(body.model_dump_json(), headers=headers, media_type="application/json")


def event(chunk: BaseModel, **options: Any) -> str:
    """A chunk as a server-sent event."""
    return f"data: {chunk.model_dump_json(**options)}\n\n"


class EventStream(StreamingResponse):
    """Events as they come, then `end`; an error on the way is an event as well."""

    def __init__(
        self,
        events: AsyncIterator[str],
        answers: EngineStreams,
        headers: Mapping[str, str] | None = None,
        end: str = DONE,
    ):
        self.answers, self._end = answers, end
        headers = {"Cache-Control": "no-cache", **(headers or {})}
        super().__init__(self._whole(events), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also where the client went before the first event
            self.answers.cancel()

    async def _whole(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            async for one in events:
                yield one
        except ApiError as error:
            yield event(error.answer)
        yield self._end


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T], answers: EngineStreams) -> T:
    """The result of `work`, which is given up when the client goes away.

    Raises:
        ApiError: the client went away; nobody reads it.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client went away")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        answers.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _join(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    return RequestOutput(
        first.text + second.text,
        first.tokens + second.tokens,
        second.finish_reason,
        second.error,
        first.prompt + second.prompt,
    )


class _Times:
    """When the tokens of one answer came."""

    def __init__(self, metrics: Metrics):
        self.metrics = metrics
        self.asked = time.monotonic()
        self.first: float | None = None
        self.tokens = 0

    def note(self, piece: RequestOutput) -> None:
        now = time.monotonic()
        if piece.tokens and self.first is None:
            self.first = now
            self.metrics.first_token.observe(now - self.asked)
            self.tokens = -len(piece.tokens)  # those of the first piece took no time of their own
        self.tokens += len(piece.tokens)
        self.metrics.answer_tokens.inc(len(piece.tokens))
        if piece.finish_reason is not None:
            self.metrics.answers.labels(piece.finish_reason).inc()
            if self.first is not None and self.tokens:
                self.metrics.token.observe((now - self.first) / self.tokens)


class ResponseWriter:
    """Puts the engine's outputs into the API's shape.

    Args:
        prefix: what the response's id begins with.
        prompt_tokens: of all prompts together.
    """

    def __init__(self, served: ServedModel, asked: GenerationParams, prefix: str, prompt_tokens: int):
        self.served = served
        self.prompt_tokens, self.answer_tokens = prompt_tokens, 0
        self.id, self.created, self.model = new_id(prefix), int(time.time()), asked.model
        self._options, self._count = asked.stream_options, asked.n or 1

    @property
    def counted(self) -> bool:
        """Whether the client wants the numbers of tokens behind a stream."""
        return bool(self._options and self._options.include_usage)

    def usage(self, request: Request, answers: EngineStreams) -> Usage:
        """The tokens in all, also for the log."""
        add_access_log(request.scope, self.model, f"{self.prompt_tokens} + {self.answer_tokens} tokens")  # type: ignore[arg-type]
        return Usage.of(self.prompt_tokens, self.answer_tokens, answers.cached_tokens(self._count))
