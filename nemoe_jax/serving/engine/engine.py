"""Continuous batching: requests join and leave a running batch, whose keys and values are in one paged cache.

    with Engine(config, params, tokenizer) as engine:
        for output in engine.submit(Request(tuple(tokenizer.encode_prompt("Hello")))):
            print(output.text, end="", flush=True)

The batch has a number of slots, of which a step takes about as many as are at work (runner.py). A request gets an idle
slot and pages for its prompt and all tokens that it may generate, so that it is never preempted; it waits while there
are none, in turn with those of other clients (fair_queue.py). A thread runs the scheduler (scheduler.py).

Whatever fails ends as little as possible: a response whose text or constraint fails ends alone; a step that fails ends
the running requests, and the waiting ones are served from an empty cache; where the cache cannot be made anew, or the
thread itself ends, everything ends with an error, nothing more is taken and `failure` says why.
"""

import logging
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nemoe_jax.adapters.loaded import AdapterPlaces, LoadedAdapters
from nemoe_jax.errors import UserError
from nemoe_jax.inference.generate import cache_dtype_of
from nemoe_jax.kernels.attention.paged import PAGE
from nemoe_jax.kernels.backend import target_platform
from nemoe_jax.model.kv_cache import division
from nemoe_jax.serving.engine.completion import end_tokens
from nemoe_jax.serving.engine.fair_queue import FairQueue
from nemoe_jax.serving.engine.page_allocator import PageAllocator
from nemoe_jax.serving.engine.programs import Program, Programs
from nemoe_jax.serving.engine.request import Request, RequestOutput
from nemoe_jax.serving.engine.runner import CHUNK, ModelRunner
from nemoe_jax.serving.engine.scheduler import Scheduler
from nemoe_jax.serving.engine.slots import Slots
from nemoe_jax.serving.engine.stream import ResponseStream
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.mesh import use_mesh
from nemoe_jax.spec.schema import Tree
from nemoe_jax.text.tokenizers.base import Tokenizer
from nemoe_jax.utils.memory import free_memory

_log = logging.getLogger(__name__)
LONGEST_RETRY = 30.0  # seconds: clients obey, and some give up where they are told to wait for minutes
MOST_VAIN_FAILURES = 8


class Busy(Exception):
    """As many requests are queued as may be. There may be room after `retry_after` seconds."""

    def __init__(self, retry_after: float):
        super().__init__(f"too many requests are waiting; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Closed(Exception):
    """The engine takes no more requests."""


class Statistics(NamedTuple):
    """What the engine does now, and has done since it began."""

    running: int
    waiting: int
    slots: int
    free_tokens: int  # of the cache
    tokens: int  # of the cache in all
    requests: int
    prompt_tokens: int
    cached_tokens: int  # of the prompts, those that were in the cache already
    answer_tokens: int
    finished: Mapping[str, int]  # requests by finish reason
    to_compile: int  # programs that are not compiled yet


class Engine:
    """Serves requests, several at a time. Close it, or use it as a context manager.

    Args:
        params: the schema's tree; over the mesh where there is one.
        max_num_seqs: requests that run at a time; up to 8 on CPU are the fastest each.
        kv_tokens: size of the KV cache in tokens, prompts and responses, rounded up to whole pages; by default as many
            as there is memory for (on CPU half of what is free), but no more than all slots can use.
        max_queued: requests that may wait for a slot.
        max_model_len: tokens of a prompt and its response at most; by default the model's context.
        adapters: LoRA adapters by the names that requests give.
        adapter_places: room for adapters that are loaded later on.
        specialize: compile only what the requests at hand need: the first token comes sooner, but a later request that
            asks for more waits for another program.
        deterministic: every step takes all slots, so that a response is the same to the last bit whoever else is there;
            otherwise the others make a difference of rounding, and a few slots at work are much faster.
        prefix_cache: prompts share the pages of what they begin with alike; where `deterministic`, in multiples of a
            whole chunk of a prompt, whose sums are the same whoever computes it.
        prompt_lookup: guess tokens from what the prompt and the response hold, and check several at a time, where that
            is faster (speculation.py); not where `deterministic`.
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
        max_num_seqs: int = 8,
        kv_tokens: int | None = None,
        max_queued: int = 64,
        max_model_len: int | None = None,
        mesh: Mesh | None = None,
        cache_dtype: str | None = None,
        adapters: Mapping[str, Tree] | None = None,
        adapter_places: AdapterPlaces | None = None,
        specialize: bool = False,
        deterministic: bool = False,
        prefix_cache: bool = True,
        prompt_lookup: bool = False,
    ):
        sizes = {"max_num_seqs": max_num_seqs, "kv_tokens": kv_tokens, "max_queued": max_queued}
        for name, value in sizes.items():
            if value is not None and value < (name != "max_queued"):
                raise UserError(f"engine: {name}: expected a positive number, got {value}")
        if max_model_len is not None and not 1 <= max_model_len <= config.context:
            raise UserError(f"max_model_len: expected 1 to {config.context}, the model's context, got {max_model_len}")
        self._most = config.context if max_model_len is None else max_model_len
        self.config, self.tokenizer = config, tokenizer
        self._max_queued, self.mesh = max_queued, mesh
        dtype = cache_dtype_of(params, cache_dtype)
        self._end_tokens = frozenset(end_tokens(config, tokenizer))
        known_V = tokenizer.known(config.vocab)
        if known_V is not None:  # an end token may be a row that the tokenizer does not have
            known_V[[token for token in self._end_tokens if token < config.vocab]] = True
        with self._ambient():
            adapter_dtype = jnp.float32 if target_platform() == "cpu" else params["embed"].dtype
            self._adapters = LoadedAdapters(config, adapters or {}, adapter_places, adapter_dtype, mesh)
            parts, cuts = division(config, max_num_seqs)
            kv_tokens = _fitting(config, max_num_seqs, dtype, self._most) if kv_tokens is None else kv_tokens
            pools = [PageAllocator(1 + -(-kv_tokens // (PAGE * parts * cuts)), cuts) for _ in range(parts)]
            self.context = min(self._most, pools[0].tokens)  # of one request, prompt and response together
            sizes_of_cache = self.context, 1 + pools[0].all, dtype
            runner = ModelRunner(
                config, params, max_num_seqs, *sizes_of_cache, self._adapters, specialize, deterministic
            )
        shared_tokens = math.lcm(CHUNK, pools[0].size) if deterministic else pools[0].size
        shared = (shared_tokens, not deterministic) if prefix_cache else ()
        self._slots = Slots(max_num_seqs, pools, runner.width, *shared)
        self._runner, self._known_V = runner, known_V
        self.programs = Programs(self._compile, self._wake)
        speculate = prompt_lookup and not deterministic
        self._scheduler = Scheduler(config, runner, self._slots, self._end_tokens, self.programs, known_V, speculate)
        self._queue = FairQueue()
        self._running: list[ResponseStream] = []  # those that were admitted and have no end yet
        self._without_end: set[ResponseStream] = set()  # those and the waiting ones, and whatever was lost between
        self._changed = threading.Condition()
        self._changes = 0  # how often it was notified
        self._closed: str | None = None  # why no more requests are taken
        self._failure: str | None = None
        self._cancelling = False  # what runs and waits is to be cancelled
        self._requests = 0
        self._vain_failures = 0  # one after another, with no request that they could have come from
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(drain=error[0] is None)

    @property
    def failure(self) -> str | None:
        """Why the engine is dead; None while it works, and after it was closed."""
        return self._failure

    def submit(self, request: Request, on_output: Callable[[RequestOutput], None] | None = None) -> ResponseStream:
        """Queues a request, from any thread; does not wait for the response.

        Args:
            on_output: takes the outputs, in the engine's thread, which it must not block; otherwise iterate over the
                response.

        Raises:
            UserError: a request that can never be served.
            Busy: too many requests wait.
            Closed: the engine is closed.
        """
        self._check(request)
        ends = request.end_tokens(self._end_tokens)
        response = ResponseStream(request, self.tokenizer, ends, on_output, self._wake)
        with self._changed:
            if self._closed is not None:
                raise Closed(self._closed)
            if len(self._queue) >= self._max_queued + self._slots.idle:
                raise Busy(self._seconds_to_a_slot())
            if request.adapter is not None:
                response.adapter = self._adapters.use(request.adapter, response)
            self._without_end.add(response)
            self._queue.append(response)
            self._requests += 1
            self._notify()
        return response

    def compile(
        self, constraints: bool = True, *, at_once: bool = True, done: Callable[[], None] = lambda: None
    ) -> None:
        """Compiles whatever requests may need; before the first one. `programs` says which are compiled.

        Args:
            constraints: also what requests under constraints need.
            at_once: all of it; otherwise returns with what the first lone request needs, and a thread goes on: other
                requests wait for what they need, and those that run go on meanwhile.
            done: called in that thread in the end.
        """
        speculation = self._scheduler.speculation
        first = self._runner.first_programs()
        then = self._runner.programs(constraints, {} if speculation is None else speculation.width)
        self.programs.begin([*first, *then] if at_once else first, () if at_once else then, done)

    def _compile(self, program: Program) -> None:
        with self._ambient():
            self._runner.compile(program, self._known_V)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that requests may give."""
        return self._adapters.names

    def load_adapter(self, name: str, adapter: Tree, replace: bool = False) -> None:
        """Requests may give that name from now on; see `LoadedAdapters.load`. Raises UserError."""
        with self._ambient():
            self._adapters.load(name, adapter, replace)

    def unload_adapter(self, name: str) -> None:
        """No request may give that name any more; those that did are finished. Raises UserError."""
        self._adapters.unload(name)

    def close(self, drain: bool = True) -> None:
        """Takes no more requests, and returns when the engine's thread has ended.

        Args:
            drain: running and waiting requests are finished; otherwise they end as "cancelled".
        """
        with self._changed:
            self._closed = self._closed or "the engine is closed"
            self._cancelling |= not drain
            self.programs.close()
            self._notify()
        self._thread.join()

    def statistics(self) -> Statistics:
        """The current load, and totals since the start."""
        with self._changed:
            return Statistics(
                running=len(self._slots.taken),
                waiting=len(self._queue),
                slots=len(self._slots),
                free_tokens=sum(pool.tokens for pool in self._slots.pools),
                tokens=sum(pool.all * PAGE * pool.cuts for pool in self._slots.pools),
                requests=self._requests,
                prompt_tokens=self._scheduler.totals["prompt"],
                cached_tokens=self._scheduler.totals["cached"],
                answer_tokens=self._scheduler.totals["answer"],
                finished=dict(self._scheduler.finished),
                to_compile=self.programs.left,
            )

    def _check(self, request: Request) -> None:
        """Raises UserError."""
        where = "context" if self.context == self._most else "cache"
        request.check(self.config.vocab, self.context, where)
        if request.adapter is not None:
            self._adapters.find(request.adapter)

    def _seconds_to_a_slot(self) -> float:
        """How long until one more request is likely to be finished: of busy time alone, from 1 s to `LONGEST_RETRY`."""
        durations = self._scheduler.durations
        if not durations:
            return 1.0
        seconds = sum(durations) / len(durations) / max(len(self._slots.taken), 1)
        return min(max(1.0, seconds), LONGEST_RETRY)

    def _wake(self) -> None:
        with self._changed:
            self._notify()

    def _notify(self) -> None:
        self._changes += 1
        self._changed.notify()

    def _ambient(self) -> Any:
        return use_mesh(self.mesh)

    def _run(self) -> None:
        """The engine's thread."""
        failure = None
        try:
            with self._ambient():
                going_on = True
                while going_on:
                    try:
                        going_on = self._iterate()
                    except Exception as error:
                        _log.exception("a step of the engine failed")
                        self._recover(error)
        except BaseException as error:  # the thread ends in order, whatever it is
            _log.exception("the engine is closed")
            failure = f"the engine failed: {error}"
        with self._changed:
            self._failure = failure
            self._closed = self._closed or failure
            left = [response for response in self._without_end if not response.finished]
            self._queue.clear()
        for response in left:
            self._end(response, "error", failure or "the engine is closed")

    def _iterate(self) -> bool:
        """Waits for work and does a step of it; False where the engine is closed and nothing is left to do."""
        with self._changed:
            while not (self._queue or self._running):
                if self._closed is not None:
                    return False
                self._changed.wait()
            changes = self._changes
        self._drop_cancelled()
        self._admit()
        worked = self._scheduler.step()
        self._running = [response for response in self._running if not response.finished]
        with self._changed:
            self._without_end = {response for response in self._without_end if not response.finished}
        lost = set(self._running) - {slot.response for slot in self._slots.taken.values()}
        if lost:
            raise RuntimeError(f"{len(lost)} responses have no slot")
        self._vain_failures = 0
        if not worked:  # until a program is compiled, or something else comes
            with self._changed:
                self._changed.wait_for(lambda: self._changes != changes)
        return True

    def _recover(self, error: Exception) -> None:
        """The running requests end, or else the first that waits; the others are served from an empty cache."""
        with self._changed:
            waiting = set(self._queue)
            self._without_end = {response for response in self._without_end if not response.finished}
            ended = [*(self._without_end - waiting)]
            if not ended and waiting:
                ended = [self._queue.pop()]
            self._running = ended
        self._vain_failures = 0 if ended else self._vain_failures + 1
        if self._vain_failures == MOST_VAIN_FAILURES:
            raise error
        self._scheduler.reset()  # where that fails, the devices are lost
        for response in ended:
            self._scheduler.finished["error"] += 1
            self._end(response, "error", f"the engine failed: {error}")
        self._running = []

    def _end(self, response: ResponseStream, reason: str, error: str | None = None) -> None:
        """Gives a response its end, come what may."""
        for _ in range(2):
            try:
                return response.finish(reason, error)
            except Exception:
                _log.exception("a response could not be finished")

    def _drop_cancelled(self) -> None:
        """Ends waiting requests that are cancelled; running ones are the scheduler's."""
        with self._changed:
            if self._cancelling:
                for response in [*self._queue, *self._running]:
                    response.cancelled = True
            ended = [response for response in self._queue if response.cancelled]
            for response in ended:
                self._queue.remove(response)
            self._running += ended  # until they have their ends
        for response in ended:
            self._scheduler.finished["cancelled"] += 1
            self._end(response, "cancelled")

    def _admit(self) -> None:
        """Whose turn it is: a request that is too large for what is free now holds up those behind it."""
        with self._changed:
            while self._queue:
                response = self._queue.first()
                if not self._scheduler.admit(response):
                    return
                self._running.append(self._queue.pop())


def _fitting(config: ModelConfig, slots: int, dtype: Any, context: int) -> int:
    """Tokens for which there is memory: four fifths of what is free on the devices, on CPU half of the host's."""
    memory = [device.memory_stats() for device in jax.local_devices()]
    if all(one and "bytes_limit" in one for one in memory):
        free = 0.8 * sum(one["bytes_limit"] - one["bytes_in_use"] for one in memory if one)
    else:
        free = 0.5 * free_memory()
    of_token = 2 * config.layers * config.kv_heads * (config.head_dim * dtype.itemsize + 4 * (dtype.name == "int8"))
    return max(min(slots * context, int(free / of_token)), PAGE)
