"""What the server answers, in the shapes of the OpenAI API."""

import math
from typing import Literal

from pydantic import BaseModel, Field

Finish = Literal["stop", "length", "tool_calls"]
ErrorType = Literal[
    "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
]


class PromptTokensDetails(BaseModel):
    """What is known of the prompts' tokens."""

    cached_tokens: int = Field(description="those that were in the KV cache already")


class Usage(BaseModel):
    """Numbers of tokens, end tokens included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> "Usage":
        details = PromptTokensDetails(cached_tokens=cached)
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=details,
        )


class CompletionLogprobs(BaseModel):
    """Log-probabilities (nats) of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first token of an echoed prompt")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion, or what came of it since the last chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class Completion(BaseModel):
    """Answer of /v1/completions; also a chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class LikelyToken(BaseModel):
    """A token with its log-probability (nats)."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(LikelyToken):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    """A function's name and its arguments, as JSON."""

    name: str
    arguments: str


class Call(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class CallDelta(Call):
    """A call in a stream: whole, and in one chunk."""

    index: int


class AssistantMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[Call] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    warnings: list[str] | None = Field(
        None,
        description="what was wrong with calls that came back as text, and what of a response or of a call's arguments "
        "does not fit its schema; none: it fits, unless it was cut off",
    )


class ChatCompletion(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What came of the message since the last chunk."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """What came of one answer since the last chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None
    warnings: list[str] | None = None


class ChatChunk(BaseModel):
    """A chunk of an answer's stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nemoe-jax"
    parent: str | None = Field(description="of an adapter: the model that it changes")
    max_model_len: int = Field(description="tokens of prompt and answer together at most")


class ModelList(BaseModel):
    """The model and its adapters."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Whether requests are taken."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: ErrorType
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Answer to a request that failed."""

    error: ErrorDetail


LOWEST = -9999.0  # JSON has no infinity; OpenAI's API says this


def finite(logprob: float | None) -> float:
    """A log-probability as JSON can hold it."""
    return LOWEST if logprob is None or not math.isfinite(logprob) else max(LOWEST, float(logprob))
