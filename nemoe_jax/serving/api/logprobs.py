"""Log-probabilities in the shapes of both APIs."""

import math
from collections.abc import Iterable, Sequence

from nemoe_jax.serving.api.responses import ChatLogprobs, CompletionLogprobs, LikelyToken, TokenLogprob
from nemoe_jax.serving.api.served_model import Served
from nemoe_jax.serving.engine.request import ScoredToken

LOWEST = -9999.0  # JSON has no infinity; OpenAI's API says this


def finite(logprob: float | None) -> float:
    """A log-probability as JSON can hold it."""
    return LOWEST if logprob is None or not math.isfinite(logprob) else max(LOWEST, float(logprob))


def chat_logprobs(served: Served, tokens: Iterable[ScoredToken]) -> ChatLogprobs:
    """Those of a chat's answer; a token that is a part of a character shows as U+FFFD beside its bytes."""

    def likely(token: int, logprob: float | None) -> LikelyToken:
        data = served.vocabulary.token_bytes(token)
        text = data.decode("utf-8", "replace") if data else served.tokenizer.piece(token)
        return LikelyToken(token=text, logprob=finite(logprob), bytes=list(data))

    return ChatLogprobs(
        content=[
            TokenLogprob(
                **likely(scored.token, scored.logprob).model_dump(), top_logprobs=[likely(*one) for one in scored.top]
            )
            for scored in tokens
        ]
    )


def completion_logprobs(served: Served, tokens: Sequence[ScoredToken], offset: int) -> CompletionLogprobs:
    """Those of a completion whose tokens begin `offset` characters into its text.

    A token that is a part of a character shows as `bytes:\\xe2`, as in OpenAI's API.
    """
    texts = [completion_text(served, scored.token) for scored in tokens]
    offsets = [offset]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    top = [{completion_text(served, token): finite(logprob) for token, logprob in scored.top} for scored in tokens]
    return CompletionLogprobs(
        tokens=texts,
        token_logprobs=[finite(scored.logprob) for scored in tokens],
        top_logprobs=top,
        text_offset=offsets[:-1],
    )


def completion_text(served: Served, token: int) -> str:
    """A token as completions name it."""
    data = served.vocabulary.token_bytes(token)
    try:
        return data.decode() or served.tokenizer.piece(token)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
