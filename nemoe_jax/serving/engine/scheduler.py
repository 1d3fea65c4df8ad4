"""The scheduler: each step prefills prompts, decodes tokens for all running requests and streams what came.

A step prefills about `CHUNK` tokens of prompts, then decodes as many tokens of every slot as take about `_STEP_SECONDS`
(iteration-level scheduling; Yu et al., 2022, Orca): requests go on between the chunks of a long prompt, new ones wait
little, and text comes smoothly.

B slots, S tokens of a block, N likeliest tokens, V vocabulary, W words of 32 bits.
"""

import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Iterator

import numpy as np

from nemoe_jax.inference.decode import BLOCK, NOT_A_NUMBER, has_penalty
from nemoe_jax.inference.generate import GREEDY
from nemoe_jax.inference.sampler import SamplerInputs, controls
from nemoe_jax.serving.engine.programs import Program, Programs
from nemoe_jax.serving.engine.request import ScoredToken
from nemoe_jax.serving.engine.runner import CHUNK, ModelRunner, chunk_length, padded_width
from nemoe_jax.serving.engine.slots import Slot, Slots, SlotTokens
from nemoe_jax.serving.engine.speculation import PromptLookup, Speculation
from nemoe_jax.serving.engine.stream import ResponseStream
from nemoe_jax.spec.config import ModelConfig

_log = logging.getLogger(__name__)
_STEP_SECONDS = 0.05
_RECENT = 32  # requests


class Scheduler:
    """What the engine's thread does with the responses that have a slot.

    Args:
        end_tokens: the model's.
        programs: which are compiled.
        known_V: which rows of the embedding stand for a token, bool; None: all.
        speculate: guess tokens from what the prompt and the response hold (speculation.py).

    totals: tokens of "prompt"s, of them "cached" ones, and of "answer"s so far; finished: responses by finish reason;
        durations: seconds that recent ones had a slot.
    """

    def __init__(
        self,
        config: ModelConfig,
        runner: ModelRunner,
        slots: Slots,
        end_tokens: frozenset[int],
        programs: Programs,
        known_V: np.ndarray | None = None,
        speculate: bool = False,
    ):
        self.config, self.runner, self.slots, self.end_tokens = config, runner, slots, end_tokens
        self.totals: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.durations: deque[float] = deque(maxlen=_RECENT)
        self.programs = programs
        self._prefilling: deque[Slot] = deque()
        self._unsent: deque[tuple[Slot, SlotTokens]] = deque()  # becomes text while the device works
        self._inputs_of: tuple[bool, list[ResponseStream | None]] | None = None  # which step's `_inputs` are
        self._inputs = controls([], config.vocab)
        self._seconds_a_chunk: dict[int, float] = {}  # of a prompt, by the width
        self._known_V = known_V
        self.speculation = Speculation(runner.batch_sizes, runner.checked_tokens) if speculate else None
        # by the size of the batch; the first token comes alone, and says more
        self._seconds_a_token = dict.fromkeys(runner.batch_sizes, _STEP_SECONDS)

    def admit(self, response: ResponseStream) -> bool:
        """Gives a response a slot, where there is one with room for it."""
        slot = self.slots.assign(response)
        if slot is None:
            return False
        self._prefilling.append(slot)
        self.totals["prompt"] += len(slot.prompt)
        return True

    def step(self) -> bool:
        """One iteration over all slots; False where there was nothing to do but to wait for programs."""
        if self._prefilling:
            self._send()
        cancelled = [slot for slot in self.slots.taken.values() if slot.response.cancelled]
        for slot in cancelled:
            self._finish(slot, "cancelled")
        worked = self._prefill() or bool(cancelled) or not self.slots.taken
        decoded = bool(self.slots.decoding()) and self._decode()
        if not decoded:
            self._send()
        return decoded or worked

    def reset(self) -> None:
        """Forgets all responses, with slots, pages and cache as at the start. The engine gives them their ends."""
        self._prefilling.clear()
        self._unsent.clear()
        self._inputs_of = None
        self.slots.reset()
        self.runner.reset()

    def _prefill(self) -> bool:
        """A chunk's worth of tokens, of one prompt after another; a long one takes several steps."""
        left, waiting, worked = CHUNK, [], False
        while self._prefilling and left > 0:
            slot = self._prefilling.popleft()
            read = self._prefill_chunk(slot)
            if read is None:
                waiting.append(slot)
                continue
            worked = True
            left -= max(read, 1)
            if not slot.decoding:
                self._prefilling.append(slot)
        self._prefilling.extendleft(reversed(waiting))
        return worked

    def _prefill_chunk(self, slot: Slot) -> int | None:
        """Reads the next tokens of a prompt, and begins to decode behind the last; how many they were.

        None where what they need is being compiled.
        """
        self.slots.reuse(slot)
        match = self.slots.match(slot)
        if match is not None and self.programs.ready(Program("copy")):
            self.runner.copy_page(slot.number, *self.slots.copy(slot, *match))
        rest = slot.prompt[slot.prefilled : -1]
        chunk = rest
        if len(rest):
            shape = self._chunk_shape(len(rest))
            if shape is None:
                return None
            length, width = shape
            chunk, table_M = rest[:length], self.slots.batch.table_BM[slot.number]
            started = time.monotonic()
            slot.finite &= self.runner.prefill(slot.number, chunk, slot.prefilled, table_M, slot.adapter, width)
            seconds = time.monotonic() - started
            self._seconds_a_chunk[width] = min(seconds, 2 * self._seconds_a_chunk.get(width, seconds))
            slot.prefilled += length
        if slot.finite:
            self.slots.publish(slot)
        if slot.prefilled < len(slot.prompt) - 1:
            return len(chunk)
        if not self._decodable(slot):
            return len(chunk) or None
        self.totals["cached"] += slot.cached
        slot.response.cached_tokens = slot.cached
        request = slot.response.request
        if request.prompt_logprobs:
            slot.response.prompt_scores = self._prompt_scores(slot)
        if has_penalty(request.sampling):
            self.runner.count_prompt(slot.number, slot.prompt)
        if self.speculation is not None:
            slot.lookup = PromptLookup(request.prompt)
        self.slots.start_decoding(slot, [*request.end_tokens(self.end_tokens)])
        return len(chunk)

    def _chunk_shape(self, left: int) -> tuple[int, int] | None:
        """How many of so many tokens are prefilled next, and padded to what; None: the program is being compiled.

        Where it need not be the same every time, another width does as well.
        """
        length = chunk_length(left)
        if self.programs.ready(Program("prefill", padded_width(length))):
            return length, padded_width(length)
        widths = [width for width in self.runner.widths if self.programs.has(Program("prefill", width))]
        if self.runner.deterministic or not widths:
            return None
        width = next((width for width in widths if width >= length), widths[-1])
        return min(length, width), width

    def _decodable(self, slot: Slot) -> bool:
        """Whether all programs are compiled that the slot needs in order to decode with those that do."""
        request = slot.response.request
        needed = [Program("score", padded_width(len(slot.prompt)))] if request.prompt_logprobs else []
        needed += [Program("penalties")] if has_penalty(request.sampling) else []
        ready = [self.programs.ready(program) for program in needed]
        return self._places([*self.slots.decoding(), slot]) is not None and all(ready)

    def _places(self, slots: list[Slot]) -> np.ndarray | None:
        """The places of slots in a step of them all; None where its program is being compiled."""
        requests = [slot.response.request for slot in slots]
        scored = any(request.top_logprobs is not None for request in requests)
        allowed = any(request.constraint is not None for request in requests)
        sizes = self.runner.batch_sizes
        if scored or allowed:
            sizes = sizes[:1] + sizes[-1:]
        program = Program("decode", allowed=allowed, scored=scored)
        compiled = [size for size in sizes if self.programs.has(program._replace(size=size))]
        numbers = [slot.number for slot in slots]
        places = self.runner.places(numbers, compiled)
        if places is None:
            places = self.runner.places(numbers, sizes)
            assert places is not None
        return places if self.programs.ready(program._replace(size=len(places))) else None

    def _prompt_scores(self, slot: Slot) -> tuple[ScoredToken, ...]:
        """The prompt's tokens with their log-probabilities; the first has none."""
        top = slot.response.request.top_logprobs or 0
        scored = [
            ScoredToken(int(token), float(logprob), tuple(zip(tokens_N.tolist(), logprobs_N.tolist(), strict=True)))
            for token, logprob, tokens_N, logprobs_N in zip(
                slot.prompt[1:], *self.runner.score(slot.prompt, slot.adapter, top), strict=True
            )
        ]
        return (ScoredToken(int(slot.prompt[0])), *scored)

    def _decode(self) -> bool:
        """Some tokens of all slots whose prompts are in the cache; False where the program is being compiled."""
        self._take_forced(self.slots.decoding())
        allowed = self._allowed(self.slots.decoding())
        active = self.slots.decoding()
        if not active:
            return True
        places = self._places(active)
        if places is None:
            return False
        scored = any(slot.response.request.top_logprobs is not None for slot in active)
        size = len(places)
        tokens = int(min(max(_STEP_SECONDS / self._seconds_a_token[size], 1), BLOCK))
        first = not any(self.slots.batch.step_B[slot.number] for slot in active)
        if allowed or first:
            tokens = 1  # the first one is waited for
        guesses = None if scored or allowed or first else self._guesses(active, places)
        started = time.monotonic()
        block = self.runner.decode(
            self.slots.at(places),
            places,
            tokens,
            self._sampler_inputs(places, not (allowed or scored)),
            self._allowed_words(allowed, places) if allowed else None,
            self.runner.top if scored else None,
            guesses,
            meanwhile=self._send,
        )
        seconds = time.monotonic() - started
        if guesses is not None and self.speculation is not None:
            self.speculation.measure(size, seconds)
        else:  # what was compiled first took long, once
            measured = seconds / max(int(block.steps), 1)
            self._seconds_a_token[size] = min(measured, 2 * self._seconds_a_token[size])
        place_of = {int(number): place for place, number in enumerate(places)}
        for slot in active:
            if self.slots.taken.get(slot.number) is not slot:
                continue  # its text failed meanwhile
            if guesses is not None and slot.lookup is not None and guesses[1][place_of[slot.number]]:
                place = place_of[slot.number]
                slot.lookup.note(int(guesses[1][place]), int(block.num_generated_B[place]) - 1)
            with self._failing_alone(slot):
                self._append(slot, SlotTokens.of(block, place_of[slot.number]), allowed.get(slot.number))
        return True

    def _guesses(self, active: list[Slot], places: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """See `Speculation.guesses`."""
        size, speculation = len(places), self.speculation
        if speculation is None or size not in speculation.width:
            return None
        if not self.programs.ready(Program("decode", size, speculation.width[size] - 1)):
            return None
        remaining_B = self.slots.batch.remaining_B
        lookups = {slot.number: (slot.lookup, int(remaining_B[slot.number])) for slot in active if slot.lookup}
        return speculation.guesses(places.tolist(), lookups, self._seconds_a_token[size])

    def _sampler_inputs(self, places: np.ndarray, plain: bool) -> SamplerInputs:
        """The sampling parameters of the slot in each place; none where it is idle."""
        slots = [self.slots.taken.get(int(number)) for number in places]
        key = plain, [None if slot is None else slot.response for slot in slots]
        if key != self._inputs_of:
            samplings = [GREEDY if slot is None else slot.response.request.sampling for slot in slots]
            self._inputs = self.runner.prepared(controls(samplings, self.config.vocab, self._known_V), plain)
            self._inputs_of = key
        return self._inputs

    def _take_forced(self, slots: list[Slot]) -> None:
        """Tokens that constraints leave no choice about, in one forward pass for all of a slot's."""
        for slot in () if self.runner.deterministic else slots:
            request = slot.response.request
            constraint = request.constraint
            if constraint is None or request.top_logprobs is not None or has_penalty(request.sampling):
                continue  # log-probabilities and counts are made by steps
            try:
                tokens = constraint.forced()[: int(self.slots.batch.remaining_B[slot.number]) - 1][:CHUNK]
            except Exception as error:
                self._finish(slot, "error", f"the answer's constraint failed: {error}")
                continue
            shape = self._chunk_shape(len(tokens)) if self._jump_pays(len(tokens), len(slots)) else None
            if shape is not None:
                tokens = tokens[: shape[0]]
                self._jump(slot, tokens, shape[1])

    def _jump_pays(self, tokens: int, slots: int) -> bool:
        """Whether that many tokens at once take less of all slots' time than in steps; the first one is waited for."""
        if tokens < 2:
            return False
        chunk = self._seconds_a_chunk.get(padded_width(tokens), math.inf)
        step = min(seconds for size, seconds in self._seconds_a_token.items() if size >= slots)
        return chunk * slots <= tokens * step

    def _jump(self, slot: Slot, tokens: list[int], width: int) -> None:
        batch = self.slots.batch
        read = np.array([batch.next_B[slot.number], *tokens[:-1]], np.int32)
        position, table_M = int(batch.length_B[slot.number]), batch.table_BM[slot.number]
        finite = self.runner.prefill(slot.number, read, position, table_M, slot.adapter, width)
        with self._failing_alone(slot):
            self._append(slot, SlotTokens(tokens, not finite, None), None)

    def _allowed(self, active: list[Slot]) -> dict[int, np.ndarray]:
        """Bits of the tokens that each slot under a constraint may have next, by its number."""
        words: dict[int, np.ndarray] = {}
        for slot in active:
            constraint = slot.response.request.constraint
            if constraint is None:
                continue
            try:
                bits_W = constraint.allowed()[: math.ceil(self.config.vocab / 32)]
                words[slot.number] = np.asarray(bits_W, np.uint32)
            except Exception as error:
                self._finish(slot, "error", f"the answer's constraint failed: {error}")
        return words

    def _allowed_words(self, allowed: dict[int, np.ndarray], places: np.ndarray) -> np.ndarray:
        """The same for all places, (B, W): the others may have all tokens."""
        allowed_BW = np.full((len(places), math.ceil(self.config.vocab / 32)), 2**32 - 1, np.uint32)
        for place, number in enumerate(places.tolist()):
            if number in allowed:
                allowed_BW[place] = 0
                allowed_BW[place, : len(allowed[number])] = allowed[number]
        return allowed_BW

    @contextlib.contextmanager
    def _failing_alone(self, slot: Slot) -> Iterator[None]:
        """What fails ends the slot's response: its own text, its own constraint. The others go on."""
        try:
            yield
        except Exception as error:
            if self.slots.taken.get(slot.number) is not slot:  # but for one in giving back its slot and pages
                raise
            _log.exception("a response failed")
            self._finish(slot, "error", f"the response failed: {error}")

    def _append(self, slot: Slot, given: SlotTokens, allowed_W: np.ndarray | None) -> None:
        """What a slot generated, for its response."""
        response = slot.response
        if given.tokens:
            self.slots.advance(slot, given.tokens)
            if slot.lookup is not None:
                slot.lookup.extend(given.tokens)
            self._unsent.append((slot, given))
            if self._may_end(slot, given.tokens):
                self._send()
                if response.finish_reason is not None:
                    return
            constraint = response.request.constraint
            if constraint is not None:
                try:
                    for token in given.tokens:
                        constraint.accept(token)
                except Exception as error:
                    return self._finish(slot, "error", f"the answer's constraint failed: {error}")
        if given.failed:
            nothing = allowed_W is not None and not allowed_W.any()
            self._finish(slot, "error", "the answer's constraint allows no token" if nothing else NOT_A_NUMBER)

    def _may_end(self, slot: Slot, tokens: list[int]) -> bool:
        """Whether the response may end with these tokens: then the next step must know."""
        request = slot.response.request
        ends = request.end_tokens(self.end_tokens)
        return bool(request.stop) or self.slots.batch.remaining_B[slot.number] < 1 or not ends.isdisjoint(tokens)

    def _send(self) -> None:
        """Gives the clients what was generated."""
        while self._unsent:
            slot, given = self._unsent.popleft()
            if self.slots.taken.get(slot.number) is slot:  # a response that failed has none
                with self._failing_alone(slot):
                    self._send_output(slot, given)

    def _send_output(self, slot: Slot, given: SlotTokens) -> None:
        response = slot.response
        output = response.append(given.scored(response.request.top_logprobs))
        self.totals["answer"] += len(output.tokens)
        if output.finish_reason is not None:
            self._release(slot, output.finish_reason)  # first: the slot is free when the last output comes
        response.emit(output)

    def _finish(self, slot: Slot, reason: str, error: str | None = None) -> None:
        """Ends a response before it is complete."""
        self._send()
        if self.slots.taken.get(slot.number) is slot:
            if reason == "error":
                self.slots.withdraw(slot)
            if reason == "error" or not slot.decoding:  # its pages may hold NaN
                self.runner.wipe(slot.number, self.slots.private_pages(slot))
            self._release(slot, reason)
        slot.response.finish(reason, error)

    def _release(self, slot: Slot, reason: str) -> None:
        if slot in self._prefilling:
            self._prefilling.remove(slot)
        if slot.decoding and reason != "error":
            self.slots.publish_response(slot)
        self.slots.release(slot)
        self.finished[reason] += 1
        self.durations.append(time.monotonic() - slot.since)
