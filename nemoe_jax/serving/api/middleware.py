"""What every HTTP request passes first: the API key, the size limit, the count of requests and their log.

A plain ASGI middleware, so that what a client does (going away, above all) reaches the handlers as it is.
"""

import dataclasses
import hmac
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemoe_jax.serving.api.api_keys import ANYBODY, CALLER, Account, Caller, read_priority
from nemoe_jax.serving.api.errors import ApiError, shutting_down
from nemoe_jax.serving.api.metrics import Metrics

NOTE = "nemoe.note"  # where in an ASGI scope a handler leaves a word for the log


@dataclasses.dataclass
class RequestMiddleware:
    """ASGI middleware: API key, body-size limit, request metrics, access log.

    accounts: of the API keys, of which every path but /health wants one as bearer token; empty: anybody may ask.
    max_bytes: of a request's body.
    paths: those that are counted by name.
    closing: whether the server is about to end, and takes nothing new.
    """

    app: ASGIApp
    metrics: Metrics
    accounts: Sequence[Account]
    max_bytes: int
    paths: Collection[str]
    log: bool
    closing: Callable[[], bool]
    anybody: Account = dataclasses.field(default_factory=lambda: Account(ANYBODY))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.monotonic(), 499  # where no answer begins, the client went away

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self.refusal(scope)
            if refusal:
                await refusal.response(scope, receive, note_status)
            else:
                await self.app(scope, self.limited(receive), note_status)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            self.metrics.requests.labels(path, method, str(status)).inc()
            if self.log:
                # quoted: no path can write a line of its own
                words = [scope["method"], quote(scope["path"]), status, f"{time.monotonic() - started:.3f} s"]
                print(*words, *scope.get(NOTE, ()), file=sys.stderr, flush=True)

    def refusal(self, scope: Scope) -> ApiError | None:
        """Why a request goes no further, before its body is read; otherwise the scope says who its caller is."""
        headers = Headers(scope=scope)
        account = self.anybody
        if self.accounts and scope["path"] != "/health":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip().encode("latin-1")
            known = [hmac.compare_digest(given, one.key.key.encode()) for one in self.accounts]  # all: it takes as long
            if scheme.lower() != "bearer" or not any(known):
                wanted = {"WWW-Authenticate": "Bearer"}
                return ApiError(401, "expected Authorization: Bearer and the API key", None, "invalid_api_key", wanted)
            account = self.accounts[known.index(True)]
        try:
            scope[CALLER] = Caller(account, read_priority(headers.get("x-priority"), account.key))
        except ApiError as error:
            return error
        if self.closing():
            return shutting_down()
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.max_bytes:
            return ApiError(413, self.too_large, code="request_too_large", headers={"Connection": "close"})
        return None

    @property
    def too_large(self) -> str:
        """What is said of a body over the limit."""
        return f"expected a request of at most {self.max_bytes:,} bytes"

    def limited(self, receive: Receive) -> Receive:
        """The same, counting: a body sent in chunks does not say how long it is."""
        come = 0

        async def counted() -> Message:
            nonlocal come
            message = await receive()
            come += len(message.get("body", b""))
            if come > self.max_bytes:
                raise HTTPException(413, self.too_large)
            return message

        return counted


def add_access_log(scope: dict[str, Any], *words: str) -> None:
    """Words for the request's line in the log."""
    scope[NOTE] = words
