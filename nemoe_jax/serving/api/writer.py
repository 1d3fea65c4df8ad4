"""What the response writers of both endpoints have in common."""

import time

from fastapi import Request

from nemoe_jax.serving.api.middleware import add_access_log
from nemoe_jax.serving.api.requests import GenerationParams
from nemoe_jax.serving.api.responses import Usage
from nemoe_jax.serving.api.served_model import ServedModel
from nemoe_jax.serving.api.streaming import EngineStreams, new_id


class ResponseWriter:
    """Puts the engine's outputs into the API's shape.

    Args:
        prefix: what the response's id begins with.
        prompt_tokens: of all prompts together.
    """

    def __init__(self, served: ServedModel, asked: GenerationParams, prefix: str, prompt_tokens: int):
        self.served = served
        self.prompt_tokens, self.answer_tokens = prompt_tokens, 0
        self.id, self.created, self.model = new_id(prefix), int(time.time()), asked.model
        self._options, self._count = asked.stream_options, asked.n or 1

    @property
    def counted(self) -> bool:
        """Whether the client wants the numbers of tokens behind a stream."""
        return bool(self._options and self._options.include_usage)

    def usage(self, request: Request, answers: EngineStreams) -> Usage:
        """The tokens in all, also for the log."""
        add_access_log(request.scope, self.model, f"{self.prompt_tokens} + {self.answer_tokens} tokens")  # type: ignore[arg-type]
        return Usage.of(self.prompt_tokens, self.answer_tokens, answers.cached_tokens(self._count))
