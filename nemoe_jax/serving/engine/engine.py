"""Continuous batching: requests join and leave a running batch, whose keys and values lie in one paged cache.

    with Engine(config, params, tokenizer) as engine:
        for piece in engine.submit(Request(tuple(tokenizer.encode_prompt("Hello")))):
            print(piece.text, end="", flush=True)

The batch has a fixed number of rows. A request that comes gets an idle row and pages for its prompt and all tokens that
it may make, so that nothing is ever taken from it again; it waits while there are none, and nobody overtakes it. A
thread takes turns (turns.py): requests join, some tokens of prompts are read, all rows make some tokens (Yu et al.,
2022, Orca: scheduling by iteration).
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nemoe_jax.adapters.multi_lora import stack_adapters
from nemoe_jax.errors import UserError
from nemoe_jax.inference.generate import cache_dtype_of
from nemoe_jax.kernels.attention.paged import PAGE
from nemoe_jax.kernels.backend import target_platform
from nemoe_jax.model.kv_cache import division
from nemoe_jax.serving.engine.completion import end_tokens
from nemoe_jax.serving.engine.page_allocator import PageAllocator
from nemoe_jax.serving.engine.request import Request, RequestOutput
from nemoe_jax.serving.engine.runner import ModelRunner
from nemoe_jax.serving.engine.scheduler import Scheduler
from nemoe_jax.serving.engine.slots import Slots
from nemoe_jax.serving.engine.stream import ResponseStream
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import Tree
from nemoe_jax.text.tokenizers.base import Tokenizer

_log = logging.getLogger(__name__)


class Busy(Exception):
    """As many requests wait already as may. One might find a place after `retry_after` seconds."""

    def __init__(self, retry_after: float):
        super().__init__(f"too many requests are waiting; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Closed(Exception):
    """The engine takes no more requests."""


class Statistics(NamedTuple):
    """What the engine does now, and has done since it began."""

    running: int
    waiting: int
    rows: int
    free_tokens: int  # of the cache
    tokens: int  # of the cache in all
    requests: int
    prompt_tokens: int
    answer_tokens: int
    finished: Mapping[str, int]  # requests by the reason why they ended


class Engine:
    """Answers requests, several at a time. Close it, or use it as a context manager.

    Args:
        params: the schema's tree; over the mesh where there is one.
        rows: requests that run at a time; up to 8 on CPU are the fastest each.
        tokens: of the cache in all, prompts and answers, rounded up to whole pages; by default as many as there is
            memory for, and 4096 a row on CPU.
        waiting: requests that may wait for a place.
        adapters: LoRA adapters by the names that requests give.
        cache_dtype: one of `generate.CACHE_DTYPES`, or None for the model's own.

    Raises:
        UserError: a size that is not positive, an unknown dtype, an adapter that does not fit the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Tree,
        tokenizer: Tokenizer,
        *,
        rows: int = 8,
        tokens: int | None = None,
        waiting: int = 64,
        mesh: Mesh | None = None,
        cache_dtype: str | None = None,
        adapters: Mapping[str, Tree] | None = None,
    ):
        for name, value in {"rows": rows, "tokens": tokens, "waiting": waiting}.items():
            if value is not None and value < (name != "waiting"):
                raise UserError(f"engine: {name}: expected a positive number, got {value}")
        self.config, self.tokenizer = config, tokenizer
        self._most_waiting, self._mesh = waiting, mesh
        dtype = cache_dtype_of(params, cache_dtype)
        self._adapters = {name: number for number, name in enumerate(adapters or {})}
        with self._ambient():
            joined = (
                stack_adapters(config, adapters, jnp.float32 if target_platform() == "cpu" else params["embed"].dtype)
                if adapters
                else None
            )
            parts, cuts = division(config, rows)
            tokens = _fitting(config, rows, dtype) if tokens is None else tokens
            free = [PageAllocator(1 + -(-tokens // (PAGE * parts * cuts)), cuts) for _ in range(parts)]
            self.context = min(config.context, free[0].tokens)  # of one request, prompt and answer together
            programs = ModelRunner(config, params, rows, self.context, 1 + free[0].all, dtype, joined)
        self._ends = frozenset(end_tokens(config, tokenizer))
        self._rows = Slots(rows, free, programs.width)
        self._turns = Scheduler(config, programs, self._rows, self._ends)
        self._queue: deque[ResponseStream] = deque()
        self._changed = threading.Condition()
        self._closed: str | None = None  # why no more requests are taken
        self._dropping = False  # what runs and waits is to be cancelled
        self._requests = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(drain=error[0] is None)

    def submit(self, request: Request, on_piece: Callable[[RequestOutput], None] | None = None) -> ResponseStream:
        """Asks for an answer, from any thread; does not wait for it.

        Args:
            on_piece: takes the pieces, in the engine's thread, which it must not hold up; else iterate over the answer.

        Raises:
            UserError: a request that can never be answered.
            Busy: too many requests wait.
            Closed: the engine is closed.
        """
        self._check(request)
        ends = self._ends | set(request.stop_tokens)
        answer = ResponseStream(request, self.tokenizer, ends, on_piece, self._wake)
        with self._changed:
            if self._closed is not None:
                raise Closed(self._closed)
            if len(self._queue) >= self._most_waiting + self._rows.idle:
                raise Busy(self._seconds_to_a_place())
            self._queue.append(answer)
            self._requests += 1
            self._changed.notify()
        return answer

    def close(self, drain: bool = True) -> None:
        """Takes no more requests, and returns when the engine's thread has ended.

        Args:
            drain: the answers under way and those that wait are finished; otherwise they end as "cancelled".
        """
        with self._changed:
            self._closed = self._closed or "the engine is closed"
            self._dropping |= not drain
            self._changed.notify()
        self._thread.join()

    def statistics(self) -> Statistics:
        """What goes on, and totals since the start."""
        with self._changed:
            return Statistics(
                running=len(self._rows.taken),
                waiting=len(self._queue),
                rows=len(self._rows),
                free_tokens=sum(pool.tokens for pool in self._rows.free),
                tokens=sum(pool.all * PAGE * pool.cuts for pool in self._rows.free),
                requests=self._requests,
                prompt_tokens=self._turns.totals["prompt"],
                answer_tokens=self._turns.totals["answer"],
                finished=dict(self._turns.finished),
            )

    def _check(self, request: Request) -> None:
        """Raises UserError."""
        where = "context" if self.context == self.config.context else "cache"
        request.check(self.config.vocab, self.context, where)
        if request.adapter is not None and request.adapter not in self._adapters:
            raise UserError(f"no adapter {request.adapter!r}; there are: {', '.join(self._adapters) or 'none'}")

    def _seconds_to_a_place(self) -> float:
        """As long as it took lately until one more request was finished, at least a second."""
        times = self._turns.finished_at
        return max(1.0, (time.monotonic() - times[0]) / len(times)) if times else 1.0

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _ambient(self) -> Any:
        return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()

    def _run(self) -> None:
        """The engine's thread."""
        with self._ambient():
            while True:
                with self._changed:
                    while not (self._queue or self._rows.taken):
                        if self._closed is not None:
                            return
                        self._changed.wait()
                try:
                    self._drop_cancelled()
                    self._admit()
                    self._turns.step()
                except Exception as error:
                    _log.exception("a step of the engine failed")
                    self._start_anew(f"the engine failed: {error}")

    def _start_anew(self, error: str) -> None:
        """The running requests end, and with an empty cache those that wait get their turn; or all end."""
        try:
            self._turns.reset(error)
        except Exception:
            _log.exception("the engine is closed: its devices are lost")
            with self._changed:
                self._closed = error
            self._end_waiting(lambda answer: True, "error", error)

    def _drop_cancelled(self) -> None:
        if self._dropping:
            for answer in [*self._queue, *(row.answer for row in self._rows.taken.values())]:
                answer.cancelled = True
        self._end_waiting(lambda answer: answer.cancelled, "cancelled")

    def _end_waiting(self, which: Callable[[ResponseStream], bool], finish: str, error: str | None = None) -> None:
        with self._changed:
            ended = [answer for answer in self._queue if which(answer)]
            for answer in ended:
                self._queue.remove(answer)
        for answer in ended:
            self._turns.finished[finish] += 1
            answer.end(finish, error)

    def _admit(self) -> None:
        """First come, first served: whoever is too large for what is free now holds up those behind."""
        with self._changed:
            while self._queue:
                answer = self._queue[0]
                adapter = -1 if answer.request.adapter is None else self._adapters[answer.request.adapter]
                if not self._turns.join(answer, adapter):
                    return
                self._queue.popleft()


def _fitting(config: ModelConfig, rows: int, dtype: Any) -> int:
    """Tokens for which the devices have memory, but for a fifth of what is free; on CPU 4096 a row."""
    most = rows * config.context
    memory = [device.memory_stats() for device in jax.local_devices()]
    if any(not one or "bytes_limit" not in one for one in memory):
        return min(most, rows * 4096)
    free = sum(one["bytes_limit"] - one["bytes_in_use"] for one in memory if one)
    of_token = 2 * config.layers * config.kv_heads * (config.head_dim * dtype.itemsize + 4 * (dtype.name == "int8"))
    return min(most, int(0.8 * free / of_token))
