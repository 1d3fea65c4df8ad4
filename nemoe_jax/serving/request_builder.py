"""Builds the engine's requests: a prompt or a chat, sampling parameters and limits, tools or a schema.

Every way to ask a model goes through here: the API, the commands, a chat in the terminal, the harness. All that can be
wrong with a request is found before it reaches the engine, and by the commands before any weights are loaded.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from nemoe_jax.errors import UserError
from nemoe_jax.serving.engine.completion import end_tokens
from nemoe_jax.serving.engine.request import MAX_TOP_LOGPROBS, Constraint, Request
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

    A template is a request whose prompt and constraint are not used: sampling parameters, limits, stop strings.

    end_tokens: the model's.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self.end_tokens = end_tokens(config, tokenizer)

    @functools.cached_property
    def vocabulary(self) -> TokenBytes:
        """The tokens' bytes, for grammars and log-probabilities."""
        return TokenBytes(self.tokenizer, self.config.vocab, sorted(self.end_tokens))

    def of_text(self, template: Request, text: str, schema: Any = None) -> Request:
        """The continuation of a text, as JSON by a schema if there is one. Raises UserError."""
        return self._checked(template, self.tokenizer.encode_prompt(text), schema=schema)

    def of_chat(
        self, template: Request, messages: Any, tools: Tools = None, tool_choice: Any = None, schema: Any = None
    ) -> Request:
        """The response to a chat; it calls tools as `tool_choice` wants, or else is JSON by a schema, if there is one.

        tool_choice: as in OpenAI's API; by default the model is free to call, in whatever form its template has.
        Raises UserError.
        """
        prompt = render.render_chat(self.tokenizer, messages, tools=tools)
        return self._checked(template, prompt, tools, tool_choice, schema)

    def of_tokens(self, template: Request, prompt: Sequence[int], constraint: Constraint | None = None) -> Request:
        """The continuation of token ids, under a constraint if there is one. Raises UserError."""
        if template.top_logprobs is not None and template.top_logprobs > MAX_TOP_LOGPROBS:
            raise UserError(f"logprobs: expected 0 to {MAX_TOP_LOGPROBS}, got {template.top_logprobs}")
        request = dataclasses.replace(template, prompt=tuple(prompt), constraint=constraint)
        request.check(self.config.vocab, self.config.context)
        StopStrings(template.stop)  # refuses what can never be found
        return request

    def constraint(
        self, tools: Tools = None, tool_choice: Any = None, schema: Any = None, parallel: bool = True
    ) -> Constraint | None:
        """What one response may be (see `tool_calls`); each response needs its own. Raises UserError."""
        return tool_calls(self.vocabulary, self.tokenizer, tools, tool_choice, parallel, schema)

    def parser(self, tools: Tools) -> ToolCallStreamParser:
        """Parses a response, with its tool calls, as it comes."""
        return ToolCallStreamParser(self.tokenizer, tools, sorted(self.end_tokens))

    def _checked(
        self, template: Request, prompt: Sequence[int], tools: Tools = None, tool_choice: Any = None, schema: Any = None
    ) -> Request:
        request = self.of_tokens(template, prompt)  # before a grammar is compiled
        asked = schema is not None or tool_choice is not None
        if not asked and (not tools or call_form(self.tokenizer) is None):
            return request
        return dataclasses.replace(request, constraint=self.constraint(tools, tool_choice, schema))
