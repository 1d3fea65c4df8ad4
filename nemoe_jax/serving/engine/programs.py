"""Which of the engine's programs are compiled. The others are compiled in threads, while those that are serve requests.

The first lone request needs two programs of some fifteen. The engine is ready with these; a thread goes on with the
others, and what a request needs before its turn is compiled at once, in a thread of its own, while other requests run.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

_log = logging.getLogger(__name__)


class Program(NamedTuple):
    """A program by what its shapes depend on."""

    kind: str
    size: int = 0  # slots of a step, or tokens of a chunk
    guesses: int = 0
    allowed: bool = False  # takes the tokens that constraints allow
    scored: bool = False  # gives log-probabilities

    def __str__(self) -> str:
        more = {
            f"with {self.guesses} guesses": self.guesses,
            "under constraints": self.allowed,
            "with log-probabilities": self.scored,
        }
        return " ".join(
            [self.kind, *[str(self.size)] * bool(self.size), *(words for words, given in more.items() if given)]
        )


class Programs:
    """Compiled programs. Until `begin` is called, all count as compiled: what is not is, where it is first called.

    Args:
        compile: compiles a program, in any thread.
        changed: called when there is another one.

    first: names of those that `begin` waited for; seconds: that compiling took, by name.
    """

    def __init__(self, compile: Callable[[Program], None], changed: Callable[[], None]):
        self._compile, self._changed = compile, changed
        self._lock = threading.Lock()
        self._begun: set[Program] = set()
        self._ready: set[Program] | None = None
        self._listed: tuple[Program, ...] = ()
        self._closed = False
        self._threads: list[threading.Thread] = []
        self.first: list[str] = []
        self.seconds: dict[str, float] = {}

    def begin(self, first: Sequence[Program], then: Sequence[Program], done: Callable[[], None]) -> None:
        """Compiles the first ones, then returns while a thread compiles the others.

        Args:
            done: called in that thread when all are compiled, unless they are given up.
        """
        self._listed = (*first, *then)
        for program in first:
            if self._claim(program):
                self._make(program)
        self._ready, self.first = set(self._begun), [*map(str, first)]

        def rest() -> None:
            for program in then:
                if self._closed:
                    return
                if self._claim(program):
                    self._make(program)
            done()

        self._start(rest)

    def has(self, program: Program) -> bool:
        """Whether it is compiled."""
        return self._ready is None or program in self._ready

    def ready(self, program: Program) -> bool:
        """Whether it is compiled; otherwise it is being compiled from now on."""
        if self.has(program):
            return True
        if self._claim(program):
            self._start(self._make, program)
        return False

    @property
    def left(self) -> int:
        """How many are not compiled yet, of those that are compiled without being asked for."""
        return sum(not self.has(program) for program in self._listed)

    def close(self) -> None:
        """Begins with no further one."""
        self._closed = True

    def wait(self, seconds: float | None = None) -> bool:
        """Waits for what is being compiled, which cannot be interrupted; whether that has ended."""
        for thread in self._threads:
            thread.join(seconds)
        return not any(thread.is_alive() for thread in self._threads)

    def _start(self, work: Callable[..., None], *given: Program) -> None:
        self._threads = [one for one in self._threads if one.is_alive()]
        self._threads.append(threading.Thread(target=work, args=given, name="compiler", daemon=True))
        self._threads[-1].start()

    def _claim(self, program: Program) -> bool:
        """Whether nobody has begun with it yet: the caller has to."""
        with self._lock:
            fresh = program not in self._begun
            self._begun.add(program)
            return fresh

    def _make(self, program: Program) -> None:
        started = time.monotonic()
        try:
            self._compile(program)
        except Exception:  # it will fail again where it is called, and end the requests that need it
            _log.exception("%s could not be compiled", program)
        self.seconds[str(program)] = time.monotonic() - started
        if self._ready is not None:
            self._ready.add(program)
        self._changed()
