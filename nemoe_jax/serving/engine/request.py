"""A request to the engine, and the outputs that come back."""

import dataclasses
from typing import TYPE_CHECKING, NamedTuple, Protocol

from nemoe_jax.errors import UserError
from nemoe_jax.inference.sampling import SamplingParams

if TYPE_CHECKING:
    import numpy as np

MAX_TOP_LOGPROBS = 20  # likeliest tokens whose log-probabilities are given
MAX_REQUEST_BYTES = 4 * 2**20  # of a request over HTTP, where nothing else is said


class Constraint(Protocol):
    """What a response must look like, token by token; the state of one response."""

    def allowed(self) -> "np.ndarray":
        """Bits of the tokens that may come next, uint32 (ceil(V / 32),), the lowest bit first."""

    def accept(self, token: int) -> None:
        """Advances by a token that was allowed."""

    def forced(self) -> list[int]:
        """Tokens that come next whatever the model says; none where it has a choice."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What one response is generated from."""

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()  # strings that end the response, and are no part of it
    stop_tokens: tuple[int, ...] = ()  # as well as the model's own end tokens
    ignore_eos: bool = False  # the model's own end tokens do not end it
    top_logprobs: int | None = None  # None: no log-probabilities; otherwise those of so many likeliest tokens as well
    adapter: str | None = None
    constraint: Constraint | None = None
    prompt_logprobs: bool = False  # log-probabilities of the prompt's tokens too, as many as `top_logprobs` says
    client: str = ""  # whose it is: waiting requests of several clients have their turns one after another
    priority: int = 0  # those with a lower one come first

    def end_tokens(self, of_model: frozenset[int]) -> frozenset[int]:
        """What ends the response; a constraint ends by the model's own end tokens, whatever `ignore_eos` says."""
        ignored = self.ignore_eos and self.constraint is None
        return frozenset(self.stop_tokens) | (frozenset() if ignored else of_model)

    def check(self, vocab: int, room: int, where: str = "context") -> None:
        """Raises UserError where no model of that vocabulary, with room for so many tokens, can respond."""
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
    """A generated token; log-probabilities (nats) are the model's own, before any sampling parameter."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, in order


class RequestOutput(NamedTuple):
    """What came since the last output; the last one of a response has a finish reason."""

    text: str
    tokens: tuple[ScoredToken, ...]  # their text may come with a later output, and that of end tokens never
    finish_reason: str | None = None  # "stop", "length", "cancelled" or "error"
    error: str | None = None
    prompt: tuple[ScoredToken, ...] = ()  # in the first output, where the request wants the prompt's log-probabilities

    @property
    def token_ids(self) -> list[int]:
        """The tokens without their log-probabilities."""
        return [scored.token for scored in self.tokens]
