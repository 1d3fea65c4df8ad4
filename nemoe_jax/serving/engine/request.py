"""What is asked of the engine, and what it gives back piece by piece."""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from nemoe_jax.errors import UserError
from nemoe_jax.inference.sampling import SamplingParams

MAX_TOP_LOGPROBS = 20  # likeliest tokens whose log-probabilities are given
MAX_REQUEST_BYTES = 4 * 2**20  # of a request over HTTP, where nothing else is said


class Constraint(Protocol):
    """What an answer must look like, token by token; of one answer alone."""

    def allowed(self) -> np.ndarray:
        """Bits of the tokens that may come next, uint32 (ceil(V / 32),), the lowest bit first."""

    def accept(self, token: int) -> None:
        """Goes on behind a token that was allowed."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What one response is generated from."""

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()  # texts that end the answer, and are no part of it
    stop_tokens: tuple[int, ...] = ()  # as well as the model's own end tokens
    top_logprobs: int | None = None  # None: no log-probabilities; otherwise those of so many likeliest tokens as well
    adapter: str | None = None
    constraint: Constraint | None = None

    def check(self, vocab: int, room: int, where: str = "context") -> None:
        """Raises UserError where no model of that vocabulary with `room` for so many tokens could answer."""
        length, new = len(self.prompt), self.max_new_tokens
        if not length:
            raise UserError("empty prompt: expected at least one token")
        for name, tokens in {"prompt": self.prompt, "stop_tokens": self.stop_tokens}.items():
            wrong = next((token for token in tokens if not 0 <= token < vocab), None)
            if wrong is not None:
                raise UserError(f"{name}: expected token ids from 0 to {vocab - 1}, got {wrong}")
        if new < 1:
            raise UserError(f"max_new_tokens: expected a positive number, got {new}")
        if length + new > room:
            raise UserError(f"prompt of {length} tokens + {new} new tokens exceed the {where} of {room} tokens")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise UserError(f"top_logprobs: expected 0 to {MAX_TOP_LOGPROBS}, got {self.top_logprobs}")
        self.sampling.check(vocab)


class ScoredToken(NamedTuple):
    """A token of the answer; log-probabilities (nats) are the model's own, before any wish of the request."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, in order


class RequestOutput(NamedTuple):
    """What came since the last piece; the last one of an answer has a reason."""

    text: str
    tokens: tuple[ScoredToken, ...]  # their text may come with a later piece, and that of end tokens never
    finish_reason: str | None = None  # "stop", "length", "cancelled" or "error"
    error: str | None = None
