"""The HTTP server: uvicorn on a pre-bound socket, with graceful shutdown."""

import asyncio
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from nemoe_jax.errors import UserError

LATE = 5  # seconds that clients have to read that their answers were given up
BACKLOG = 1024  # connections that the system keeps for us until we take them


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, not listening yet; port 0 is any free one.

    Raises:
        UserError: the address is taken, or none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"--host {host} --port {port}: {reason}") from error


def url(bound: socket.socket) -> str:
    """Where clients find it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpServer(uvicorn.Server):
    """SIGINT or SIGTERM: takes nothing new, lets running answers end, then returns. A second one ends them at once.

    drain_seconds: how long answers may take to end.
    abort: makes those end that have not until then; they are errors to their clients.
    """

    def __init__(self, drain_seconds: int, abort: Callable[[], None]):
        self.drain_seconds, self.abort = drain_seconds, abort
        self.closing = False

    def serve_app(self, app: FastAPI, bound: socket.socket) -> None:
        """Answers requests until a signal comes. Raises UserError where another process got the address first."""
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=self.drain_seconds + LATE,
            )
        )
        try:
            bound.listen(BACKLOG)
        except OSError as error:
            raise UserError(f"{url(bound)}: {error.strerror}") from error
        self.run(sockets=[bound])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Unlike uvicorn's, does not raise the signal again in the end: the exit status is 0."""
        if self.closing:
            return self._end_answers()
        print("shutting down; running answers end first", file=sys.stderr, flush=True)
        self.closing = self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which would cut answers short without a word when their time is over."""
        late = asyncio.get_running_loop().call_later(self.drain_seconds, self._end_answers)
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()

    def _end_answers(self) -> None:
        # elsewhere, as the event loop has to pass on what answers say at their end
        threading.Thread(target=self.abort, daemon=True).start()
