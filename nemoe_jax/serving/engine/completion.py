"""A completed response: the outputs put together, with its text, its tokens and its times."""

import sys
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from nemoe_jax.errors import UserError
from nemoe_jax.serving.engine.request import RequestOutput, ScoredToken
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.text.chat.tool_parser import ParsedAnswer, ToolCallStreamParser
from nemoe_jax.text.tokenizers.base import Tokenizer

_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= {code: 0xFFFD for code in range(0x80, 0xA0)}


class Completion(NamedTuple):
    """A response from its first output to its last."""

    text: str
    tokens: list[ScoredToken]  # without the end token
    finish_reason: str  # as in RequestOutput
    prefill_seconds: float  # to the first output
    seconds: float  # to the last
    first_tokens: int  # that came with the first output
    parsed: ParsedAnswer | None = None  # where it was parsed for tool calls

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first output; None where nothing came after it."""
        tokens, seconds = len(self.tokens) - self.first_tokens, self.seconds - self.prefill_seconds
        return tokens / seconds if tokens > 0 and seconds > 0 else None

    def figures(self, tokenizer: Tokenizer, prompt_tokens: int, logprobs: bool) -> dict[str, Any]:
        """What `--json` and a batch print of it."""
        figures: dict[str, Any] = {
            "text": self.text,
            "tokens": [scored.token for scored in self.tokens],
            "prompt_tokens": prompt_tokens,
            "finish_reason": self.finish_reason,
        }
        if self.parsed is not None:
            figures["tool_calls"] = [call.as_message() for call in self.parsed.calls]
            figures["warnings"] = list(self.parsed.warnings)
        if logprobs:
            figures["logprobs"] = [
                {
                    "token": scored.token,
                    "piece": tokenizer.piece(scored.token),
                    "logprob": scored.logprob,
                    "top": [
                        {"token": token, "piece": tokenizer.piece(token), "logprob": logprob}
                        for token, logprob in scored.top
                    ],
                }
                for scored in self.tokens
            ]
        return figures


def end_tokens(config: ModelConfig, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end a response of this model."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    return {token for token in (tokenizer.eos_id, *ends) if token is not None}


def shown(text: str) -> None:
    """Prints text as it came; on a terminal, control characters that it may hold do nothing there."""
    print(harmless(text) if sys.stdout.isatty() else text, end="", flush=True)


def harmless(text: str) -> str:
    """Text for a terminal: control characters but line ends and tabs as their pictures, such as ␛."""
    return text.translate(_PICTURES)


def collect(
    outputs: Iterable[RequestOutput],
    end_tokens: Collection[int],
    show: Callable[[str], None] = lambda text: None,
    parser: ToolCallStreamParser | None = None,
) -> Completion:
    """Waits for a whole response.

    Args:
        show: gets the text as it comes.
        parser: finds tool calls in it.

    Raises:
        UserError: the model could not respond.
    """
    started = time.monotonic()
    first, first_tokens = 0.0, 0
    texts: list[str] = []
    tokens: list[ScoredToken] = []
    finish = "error"
    for output in outputs:
        if output.finish_reason == "error":
            raise UserError(output.error or "the model could not answer")
        if output.tokens and not first_tokens:
            first, first_tokens = time.monotonic() - started, len(output.tokens)
        texts.append(output.text if parser is None else parser.push(output.text, output.token_ids))
        tokens += output.tokens
        if texts[-1]:
            show(texts[-1])
        finish = output.finish_reason or finish
    seconds = time.monotonic() - started
    parsed = None if parser is None else parser.finish()
    if parsed is not None and parsed.text:
        texts.append(parsed.text)
        show(parsed.text)
    if tokens and tokens[-1].token in end_tokens:
        tokens.pop()
    return Completion("".join(texts), tokens, finish, first or seconds, seconds, first_tokens, parsed)
