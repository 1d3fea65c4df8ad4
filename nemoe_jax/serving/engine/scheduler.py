"""The running batch, turn by turn: prompts are read, tokens made, answers told what came.

A turn reads about `CHUNK` tokens of prompts, then makes as many tokens of every row as take about `_TURN` seconds: so
rows go on between the chunks of a long prompt, whoever joins waits little, and text comes smoothly.

B rows, S tokens of a block, N likeliest tokens, W words of 32 bits.
"""

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

_TURN = 0.05
_RECENT = 32  # requests


class Scheduler:
    """What the engine's thread does with the answers that have a row.

    Args:
        ends: the model's end tokens.

    totals: tokens of "prompt"s and "answer"s so far; finished: answers by the reason why they ended; finished_at: when
        the last ones did.
    """

    def __init__(self, config: ModelConfig, programs: ModelRunner, rows: Slots, ends: frozenset[int]):
        self.config, self.programs, self.rows, self.ends = config, programs, rows, ends
        self.totals: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.finished_at: deque[float] = deque(maxlen=_RECENT)
        self._reading: deque[Slot] = deque()
        self._seconds_a_step = 1e-3

    def join(self, answer: ResponseStream, adapter: int) -> bool:
        """Gives an answer a row, where there is one with room for it; `adapter` is a number, or -1."""
        row = self.rows.join(answer, adapter)
        if row is None:
            return False
        self._reading.append(row)
        self.totals["prompt"] += len(row.prompt)
        return True

    def step(self) -> None:
        """A turn."""
        for row in [*self.rows.taken.values()]:
            if row.answer.cancelled:
                self._end(row, "cancelled")
        self._read_prompts()
        if self.rows.working():
            self._decode()

    def reset(self, error: str) -> None:
        """All answers that have a row end with that error, and the cache is as new."""
        self._reading.clear()
        for row in [*self.rows.taken.values()]:
            self._leave(row, "error")
            row.answer.end("error", error)
        self.programs.reset()

    def _read_prompts(self) -> None:
        """A chunk's worth of tokens, of one prompt after another; a long one takes its turns among the others."""
        left = CHUNK
        while self._reading and left > 0:
            row = self._reading.popleft()
            chunk = row.prompt[row.read : len(row.prompt) - 1][:CHUNK]
            if len(chunk):
                self.programs.read(row.number, chunk, row.read, self.rows.batch.table_BM[row.number], row.adapter)
            row.read += len(chunk)
            left -= max(len(chunk), 1)
            if row.read < len(row.prompt) - 1:
                self._reading.append(row)
                continue
            if has_penalty(row.answer.request.sampling):
                self.programs.count_prompt(row.number, row.prompt)
            request = row.answer.request
            self.rows.work(row, [*self.ends, *request.stop_tokens])

    def _decode(self) -> None:
        """Some tokens of all rows that are at work."""
        working = self.rows.working()
        allowed_BW = self._allowed(working)
        working = [row for row in working if row.answer.finish_reason is None]
        if not working:
            return
        steps = 1 if allowed_BW is not None else int(min(max(_TURN / self._seconds_a_step, 1), BLOCK))
        scored = any(row.answer.request.top_logprobs is not None for row in working)
        started = time.monotonic()
        block = self.programs.decode(
            self.rows.batch,
            steps,
            self._wishes(),
            allowed_BW,
            min(MAX_TOP_LOGPROBS, self.config.vocab) if scored else None,
        )
        # what was compiled first took long, once
        measured = (time.monotonic() - started) / max(int(block.steps), 1)
        self._seconds_a_step = min(measured, 2 * self._seconds_a_step)
        for row in working:
            self._give(row, block, allowed_BW)

    def _wishes(self) -> SamplerInputs:
        """What each row asks of the choice of its tokens; nothing where it rests."""
        samplings = [GREEDY] * len(self.rows)
        for row in self.rows.working():
            samplings[row.number] = row.answer.request.sampling
        return controls(samplings, self.config.vocab)

    def _allowed(self, working: list[Slot]) -> np.ndarray | None:
        """Bits of the tokens that each row may have next; None where all may have all."""
        constrained = [row for row in working if row.answer.request.constraint is not None]
        if not constrained:
            return None
        allowed_BW = np.full((len(self.rows), math.ceil(self.config.vocab / 32)), 2**32 - 1, np.uint32)
        for row in constrained:
            constraint = row.answer.request.constraint
            assert constraint is not None
            try:
                bits_W = constraint.allowed()[: allowed_BW.shape[1]]
                allowed_BW[row.number] = 0
                allowed_BW[row.number, : len(bits_W)] = bits_W
            except Exception as error:
                self._end(row, "error", f"the answer's constraint failed: {error}")
        return allowed_BW

    def _give(self, row: Slot, block: DecodedTokens, allowed_BW: np.ndarray | None) -> None:
        """What a block has of a row's answer."""
        number, answer = row.number, row.answer
        made = int(block.num_generated_B[number])
        if made:
            tokens = block.tokens_SB[:made, number].tolist()
            self.rows.count(row, tokens)
            piece = answer.take(self._scored(row, tokens, block))
            self.totals["answer"] += len(piece.tokens)
            if piece.finish_reason is not None:
                self._leave(row, piece.finish_reason)  # first: its place is free when the last piece comes
            answer.show(piece)
            if piece.finish_reason is not None:
                return
            constraint = answer.request.constraint
            if constraint is not None:
                try:
                    constraint.accept(tokens[0])
                except Exception as error:
                    return self._end(row, "error", f"the answer's constraint failed: {error}")
        if block.failed_B[number]:
            nothing = allowed_BW is not None and not allowed_BW[number].any()
            self._end(row, "error", "the answer's constraint allows no token" if nothing else NOT_A_NUMBER)

    def _scored(self, row: Slot, tokens: list[int], block: DecodedTokens) -> list[ScoredToken]:
        top = row.answer.request.top_logprobs
        if top is None:
            return [ScoredToken(token) for token in tokens]
        assert block.scores is not None
        logprob_SB, tokens_SBN, logprobs_SBN = block.scores
        scored = []
        for at, token in enumerate(tokens):
            likeliest = zip(
                tokens_SBN[at, row.number, :top].tolist(), logprobs_SBN[at, row.number, :top].tolist(), strict=True
            )
            scored.append(ScoredToken(token, float(logprob_SB[at, row.number]), tuple(likeliest)))
        return scored

    def _end(self, row: Slot, finish: str, error: str | None = None) -> None:
        """An answer ends before it is complete."""
        if finish == "error" or not row.working:  # there may be what is no number
            self.programs.wipe(row.number, row.pages)
        self._leave(row, finish)
        row.answer.end(finish, error)

    def _leave(self, row: Slot, finish: str) -> None:
        if row in self._reading:
            self._reading.remove(row)
        self.rows.leave(row)
        self.finished[finish] += 1
        self.finished_at.append(time.monotonic())
