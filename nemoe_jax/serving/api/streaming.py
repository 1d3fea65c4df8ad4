"""How answers go out: whole, or as server-sent events; and that a client which goes away frees what it asked for."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nemoe_jax.serving.api.engine_streams import Answers
from nemoe_jax.serving.api.errors import ApiError

DONE = "data: [DONE]\n\n"
T = TypeVar("T")


def new_id(kind: str) -> str:
    """A name for an answer."""
    return f"{kind}-{uuid.uuid4().hex}"


def as_json(body: BaseModel) -> Response:
    """A whole answer."""
    return Response(body.model_dump_json(), media_type="application/json")


def event(chunk: BaseModel, **options: Any) -> str:
    """A chunk as a server-sent event."""
    return f"data: {chunk.model_dump_json(**options)}\n\n"


class EventStream(StreamingResponse):
    """Events as they come, then [DONE]; an error on the way is an event as well."""

    def __init__(self, events: AsyncIterator[str], answers: Answers):
        self.answers = answers
        super().__init__(self._whole(events), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also where the client went before the first event
            self.answers.cancel()

    @staticmethod
    async def _whole(events: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            async for one in events:
                yield one
        except ApiError as error:
            yield event(error.answer)
        yield DONE


async def unless_gone(request: Request, work: Coroutine[Any, Any, T], answers: Answers) -> T:
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
