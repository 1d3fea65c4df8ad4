"""Builds requests to the engine from prompts and chats.

All that can be wrong with one is found here, before any weights are loaded.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from nemoe_jax.errors import UserError
from nemoe_jax.serving.engine.completion import end_tokens
from nemoe_jax.serving.engine.request import MAX_TOP_LOGPROBS, Request
from nemoe_jax.serving.engine.stop_strings import StopStrings
from nemoe_jax.serving.structured.grammar import TokenBytes, tool_calls
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.text.chat import render
from nemoe_jax.text.chat.tool_formats import call_form
from nemoe_jax.text.chat.tool_parser import ToolCallStreamParser
from nemoe_jax.text.tokenizers.base import Tokenizer

Tools = Sequence[Mapping[str, Any]] | None


class RequestBuilder:
    """Makes requests for one model.

    end_tokens: the model's.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self.end_tokens = end_tokens(config, tokenizer)

    def of_text(self, template: Request, text: str, schema: Any = None) -> Request:
        """The continuation of a text, as JSON by a schema if there is one. Raises UserError."""
        return self._checked(template, self.tokenizer.encode_prompt(text), schema=schema)

    def of_chat(
        self, template: Request, messages: Any, tools: Tools = None, tool_choice: Any = None, schema: Any = None
    ) -> Request:
        """The answer to a chat; it calls tools as `tool_choice` wants, or else is JSON by a schema, if there is one.

        tool_choice: as in OpenAI's API; by default the model is free to call, in whatever form its template has.
        Raises UserError.
        """
        prompt = render.render_chat(self.tokenizer, messages, tools=tools)
        return self._checked(template, prompt, tools, tool_choice, schema)

    def parser(self, tools: Tools) -> ToolCallStreamParser:
        """Parses a response, with its tool calls, as it comes."""
        return ToolCallStreamParser(self.tokenizer, tools, sorted(self.end_tokens))

    @functools.cached_property
    def _vocabulary(self) -> TokenBytes:
        return TokenBytes(self.tokenizer, self.config.vocab, sorted(self.end_tokens))

    def _checked(
        self, template: Request, prompt: Sequence[int], tools: Tools = None, tool_choice: Any = None, schema: Any = None
    ) -> Request:
        if template.top_logprobs is not None and template.top_logprobs > MAX_TOP_LOGPROBS:
            raise UserError(f"logprobs: expected 0 to {MAX_TOP_LOGPROBS}, got {template.top_logprobs}")
        request = dataclasses.replace(template, prompt=tuple(prompt))
        request.check(self.config.vocab, self.config.context)
        StopStrings(template.stop)  # refuses what can never be found
        constraint = None
        if schema is not None or tool_choice is not None or call_form(self.tokenizer) is not None:
            constraint = tool_calls(self._vocabulary, self.tokenizer, tools, tool_choice, schema=schema)
        return dataclasses.replace(request, constraint=constraint)
