"""The scheduler: each step prefills prompts, decodes tokens for all running requests and streams what came.

A step prefills about `CHUNK` tokens of prompts, then decodes as many tokens of every slot as take about `_STEP_SECONDS`
(iteration-level scheduling; Yu et al., 2022, Orca): requests go on between the chunks of a long prompt, new ones wait
little, and text comes smoothly.

B slots, S tokens of a block, N likeliest tokens, V vocabulary, W words of 32 bits.
"""

import logging
import math
import time
from collections import Counter, deque

import numpy as np

from nemoe_jax.inference.decode import BLOCK, NOT_A_NUMBER, DecodedTokens, has_penalty
from nemoe_jax.inference.generate import GREEDY
from nemoe_jax.inference.sampler import SamplerInputs, controls
from nemoe_jax.serving.engine.request import MAX_TOP_LOGPROBS, ScoredToken
from nemoe_jax.serving.engine.runner import CHUNK, ModelRunner
from nemoe_jax.serving.engine.slots import Slot, Slots
from nemoe_jax.serving.engine.stream import ResponseStream
from nemoe_jax.spec.config import ModelConfig

_log = logging.getLogger(__name__)
_STEP_SECONDS = 0.05
_RECENT = 32  # requests


class Scheduler:
    """What the engine's thread does with the responses that have a slot.

    Args:
        end_tokens: the model's.
        known_V: which rows of the embedding stand for a token, bool; None: all.

    totals: tokens of "prompt"s and "answer"s so far; finished: responses by finish reason; durations: seconds that
        recent ones had a slot.
    """

    def __init__(
        self,
        config: ModelConfig,
        runner: ModelRunner,
        slots: Slots,
        end_tokens: frozenset[int],
        known_V: np.ndarray | None = None,
    ):
        self.config, self.runner, self.slots, self.end_tokens = config, runner, slots, end_tokens
        self.totals: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.durations: deque[float] = deque(maxlen=_RECENT)
        self._prefilling: deque[Slot] = deque()
        self._known_V = known_V
        self._seconds_a_token = _STEP_SECONDS  # the first token comes alone, and says more

    def admit(self, response: ResponseStream, adapter: int) -> bool:
        """Gives a response a slot, where there is one with room for it; `adapter` is a number, or -1."""
        slot = self.slots.assign(response, adapter)
        if slot is None:
            return False
        self._prefilling.append(slot)
        self.totals["prompt"] += len(slot.prompt)
        return True

    def step(self) -> None:
        """One iteration over all slots."""
        for slot in [*self.slots.taken.values()]:
            if slot.response.cancelled:
                self._finish(slot, "cancelled")
        self._prefill()
        if self.slots.decoding():
            self._decode()

    def reset(self) -> None:
        """Forgets all responses, with slots, pages and cache as at the start. The engine gives them their ends."""
        self._prefilling.clear()
        self.slots.reset()
        self.runner.reset()

    def _prefill(self) -> None:
        """A chunk's worth of tokens, of one prompt after another; a long one takes several steps."""
        left = CHUNK
        while self._prefilling and left > 0:
            slot = self._prefilling.popleft()
            chunk = slot.prompt[slot.prefilled : len(slot.prompt) - 1][:CHUNK]
            if len(chunk):
                table_M = self.slots.batch.table_BM[slot.number]
                self.runner.read(slot.number, chunk, slot.prefilled, table_M, slot.adapter)
            slot.prefilled += len(chunk)
            left -= max(len(chunk), 1)
            if slot.prefilled < len(slot.prompt) - 1:
                self._prefilling.append(slot)
                continue
            request = slot.response.request
            if request.prompt_logprobs:
                slot.response.prompt_scores = self._prompt_scores(slot)
            if has_penalty(request.sampling):
                self.runner.count_prompt(slot.number, slot.prompt)
            self.slots.start_decoding(slot, [*request.end_tokens(self.end_tokens)])

    def _prompt_scores(self, slot: Slot) -> tuple[ScoredToken, ...]:
        """The prompt's tokens with their log-probabilities; the first has none."""
        top = slot.response.request.top_logprobs or 0
        logprob_T, tokens_TN, logprobs_TN = self.runner.score(slot.prompt, slot.adapter, max(top, 1))
        scored = [
            ScoredToken(int(token), float(logprob), tuple(zip(tokens_N.tolist(), logprobs_N.tolist(), strict=True)))
            for token, logprob, tokens_N, logprobs_N in zip(
                slot.prompt[1:], logprob_T, tokens_TN[:, :top], logprobs_TN[:, :top], strict=True
            )
        ]
        return (ScoredToken(int(slot.prompt[0])), *scored)

    def _decode(self) -> None:
        """Some tokens of all slots whose prompts are in the cache."""
        allowed_BW = self._allowed(self.slots.decoding())
        active = self.slots.decoding()
        if not active:
            return
        tokens = 1 if allowed_BW is not None else int(min(max(_STEP_SECONDS / self._seconds_a_token, 1), BLOCK))
        scored = any(slot.response.request.top_logprobs is not None for slot in active)
        started = time.monotonic()
        block = self.runner.decode(
            self.slots.batch,
            tokens,
            self._sampler_inputs(),
            allowed_BW,
            min(MAX_TOP_LOGPROBS, self.config.vocab) if scored else None,
        )
        # what was compiled first took long, once
        measured = (time.monotonic() - started) / max(int(block.steps), 1)
        self._seconds_a_token = min(measured, 2 * self._seconds_a_token)
        for slot in active:
            try:
                self._append(slot, block, allowed_BW)
            except Exception as error:  # its own text, its own constraint: the others go on
                if self.slots.taken.get(slot.number) is not slot:  # but for one in giving back its slot and pages
                    raise
                _log.exception("a response failed")
                self._finish(slot, "error", f"the response failed: {error}")

    def _sampler_inputs(self) -> SamplerInputs:
        """The sampling parameters of each slot; none where it is idle."""
        samplings = [GREEDY] * len(self.slots)
        for slot in self.slots.decoding():
            samplings[slot.number] = slot.response.request.sampling
        return controls(samplings, self.config.vocab, self._known_V)

    def _allowed(self, active: list[Slot]) -> np.ndarray | None:
        """Bits of the tokens that each slot may have next; None where all may have all."""
        constrained = [slot for slot in active if slot.response.request.constraint is not None]
        if not constrained:
            return None
        allowed_BW = np.full((len(self.slots), math.ceil(self.config.vocab / 32)), 2**32 - 1, np.uint32)
        for slot in constrained:
            constraint = slot.response.request.constraint
            assert constraint is not None
            try:
                bits_W = constraint.allowed()[: allowed_BW.shape[1]]
                allowed_BW[slot.number] = 0
                allowed_BW[slot.number, : len(bits_W)] = bits_W
            except Exception as error:
                self._finish(slot, "error", f"the answer's constraint failed: {error}")
        return allowed_BW

    def _append(self, slot: Slot, block: DecodedTokens, allowed_BW: np.ndarray | None) -> None:
        """A slot's share of a block, for its response."""
        number, response = slot.number, slot.response
        generated = int(block.num_generated_B[number])
        if generated:
            tokens = block.tokens_SB[:generated, number].tolist()
            self.slots.advance(slot, tokens)
            output = response.append(self._scored(slot, tokens, block))
            self.totals["answer"] += len(output.tokens)
            if output.finish_reason is not None:
                self._release(slot, output.finish_reason)  # first: the slot is free when the last output comes
            response.emit(output)
            if output.finish_reason is not None:
                return
            constraint = response.request.constraint
            if constraint is not None:
                try:
                    constraint.accept(tokens[0])
                except Exception as error:
                    return self._finish(slot, "error", f"the answer's constraint failed: {error}")
        if block.failed_B[number]:
            nothing = allowed_BW is not None and not allowed_BW[number].any()
            self._finish(slot, "error", "the answer's constraint allows no token" if nothing else NOT_A_NUMBER)

    def _scored(self, slot: Slot, tokens: list[int], block: DecodedTokens) -> list[ScoredToken]:
        top = slot.response.request.top_logprobs
        if top is None:
            return [ScoredToken(token) for token in tokens]
        assert block.scores is not None
        logprob_SB, tokens_SBN, logprobs_SBN = block.scores
        scored = []
        for at, token in enumerate(tokens):
            likeliest = zip(
                tokens_SBN[at, slot.number, :top].tolist(), logprobs_SBN[at, slot.number, :top].tolist(), strict=True
            )
            scored.append(ScoredToken(token, float(logprob_SB[at, slot.number]), tuple(likeliest)))
        return scored

    def _finish(self, slot: Slot, reason: str, error: str | None = None) -> None:
        """Ends a response before it is complete."""
        if self.slots.taken.get(slot.number) is slot:
            if reason == "error" or not slot.decoding:  # its pages may hold NaN
                self.runner.wipe(slot.number, slot.pages)
            self._release(slot, reason)
        slot.response.finish(reason, error)

    def _release(self, slot: Slot, reason: str) -> None:
        if slot in self._prefilling:
            self._prefilling.remove(slot)
        self.slots.release(slot)
        self.finished[reason] += 1
        self.durations.append(time.monotonic() - slot.since)
