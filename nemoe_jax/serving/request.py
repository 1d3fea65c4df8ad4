"""What is asked of the engine, and what it gives back piece by piece."""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from nemoe_jax.sampling import Sampling


class Constraint(Protocol):
    """What an answer must look like, token by token; of one answer alone."""

    def allowed(self) -> np.ndarray:
        """Bits of the tokens that may come next, uint32 (ceil(V / 32),), the lowest bit first."""

    def accept(self, token: int) -> None:
        """Goes on behind a token that was allowed."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer that is wanted."""

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()  # texts that end the answer, and are no part of it
    stop_tokens: tuple[int, ...] = ()  # as well as the model's own end tokens
    top_logprobs: int | None = None  # None: no log-probabilities; otherwise those of so many likeliest tokens as well
    adapter: str | None = None
    constraint: Constraint | None = None


class ScoredToken(NamedTuple):
    """A token of the answer; log-probabilities (nats) are the model's own, before any wish of the request."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, in order


class Piece(NamedTuple):
    """What came since the last piece; the last one of an answer has a reason."""

    text: str
    tokens: tuple[ScoredToken, ...]  # their text may come with a later piece, and that of end tokens never
    finish: str | None = None  # "stop", "length", "cancelled" or "error"
    error: str | None = None
