"""Answers of a given form: JSON by a schema, a regular expression, or calls of tools, kept to token by token.

    vocabulary = Vocabulary(tokenizer, config.vocab)                 # once
    constraint = json_schema(vocabulary, {"type": "object"})         # for each answer
    constraint.allowed()                                             # bits of the tokens that may come next
    constraint.accept(token)

The grammars are llguidance's. An end token is allowed exactly when the text is complete, so an answer is broken only
where it is cut short by its limit of tokens.

Calls of tools: with `required` or a named function, calls in the model's own form (`nemoe_jax.chat_calls`) are all that
may come. With `auto` the model is free to begin one; from its first token on, the grammar holds. `none` forbids the
token that begins one. White space in calls is as the chat formats write it, so that they read their own answers as
they were trained to.

V vocabulary, W words of 32 tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nemoe_jax.errors import UserError
from nemoe_jax.serving.engine.request import Constraint
from nemoe_jax.serving.structured import tool_grammar
from nemoe_jax.serving.structured.token_bytes import TokenBytes
from nemoe_jax.text.chat.tool_formats import known_call_form
from nemoe_jax.text.chat.tools import check_tool_choice, check_tools
from nemoe_jax.text.tokenizers.base import Tokenizer

__all__ = ["TokenBytes", "json_object", "json_schema", "regex", "tool_calls"]

# Forced texts are not tokenized by the library: it would take the space in front of a text for the text's own.
HEADER = '%llguidance {"no_forcing": true}\n'
UNFULFILLED = "no text of the model's tokens can fulfill it"
WHITE_SPACE = r" |\n[ \t]{0,40}"  # between the tokens of JSON: a bound, as a model may write nothing else for ever


def json_schema(vocabulary: TokenBytes, schema: Any) -> Constraint:
    """Answers that are JSON by a schema (of https://json-schema.org, as far as llguidance has it).

    Properties come in the schema's order, those of no name in it last. Raises UserError on a schema that is none, that
    nothing can fulfill, or that has keywords which llguidance cannot enforce.
    """
    return Grammar(vocabulary, f"start: {_json(vocabulary, schema)}", "schema")


def json_object(vocabulary: TokenBytes) -> Constraint:
    """Answers that are any JSON object."""
    return json_schema(vocabulary, {"type": "object"})


def regex(vocabulary: TokenBytes, pattern: str) -> Constraint:
    """Answers that a regular expression matches as a whole. Raises UserError where it is none."""
    import llguidance

    return Grammar(vocabulary, f"start: /{llguidance.regex_to_lark(pattern, '')}/", "regular expression")


def tool_calls(
    vocabulary: TokenBytes,
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: Any = None,
    parallel: bool = True,
    schema: Any = None,
) -> Constraint | None:
    """What an answer may be where tools are given; None where it may be anything.

    tool_choice: `none`, `auto`, `required`, or a function that must be called (once).
    parallel: whether there may be several calls.
    schema: what an answer that calls nothing must be (see `json_schema`); None where it may be any text.
    Raises UserError on bad tools or parameters, and where the tokenizer has no known form of calls.
    """
    check_tools(tools)
    mode, name = check_tool_choice(tool_choice, tools)
    if schema is not None and (not tools or mode == "none"):
        return json_schema(vocabulary, schema)
    if not tools:
        return None
    form = known_call_form(tokenizer)
    if mode == "none":  # a tag that is text can be written; it is then read as text
        return UntilToolCall(vocabulary, forbidden=form.start) if isinstance(form.start, int) else None
    chosen = [(at, tool["function"]) for at, tool in enumerate(tools) if name in (None, tool["function"]["name"])]
    several = parallel and name is None
    start = "start: calls\n"
    if mode == "auto" and schema is not None:
        start = f"start: calls | answer\nanswer: {_json(vocabulary, schema)}\n"
    elif mode == "auto" and isinstance(form.start, str):
        special = [token for token in tokenizer.control.values() if token not in vocabulary.end_tokens]
        start = tool_grammar.after_text(form, special)
    rules = tool_grammar.call_rules(form, chosen, several, vocabulary.leading_space)
    try:
        calls = Grammar(vocabulary, start + rules, "tools")
    except UserError:
        for at, function in chosen:
            tool_grammar.check_arguments(at, function)
        if schema is not None:
            json_schema(vocabulary, schema)
        raise
    if mode == "auto" and schema is None and isinstance(form.start, int):
        return UntilToolCall(vocabulary, begin=form.start, then=calls, late=form.after_text)
    return calls


def _json(vocabulary: TokenBytes, schema: Any) -> str:
    """JSON by a schema, as part of a rule. Raises UserError."""
    if not isinstance(schema, Mapping | bool):
        raise UserError(f"schema: expected a JSON schema (an object), got {schema!r:.80}")
    try:
        written = tool_grammar.json_rule(schema, {"whitespace_pattern": WHITE_SPACE})
    except UserError as error:
        raise UserError(f"schema: {error}") from error
    return ('" "? ' if vocabulary.leading_space else "") + written


class Grammar:
    """A constraint by one of llguidance's grammars."""

    def __init__(self, vocabulary: TokenBytes, rules: str, what: str):
        import llguidance

        self._vocab_size, self._library = vocabulary.vocab_size, vocabulary.library
        self._what = what
        # ten times the library's own bounds, for schemas of a thousand properties
        limits = llguidance.LLParserLimits(max_items_in_row=20_000, step_max_items=500_000, verbose_errors=False)
        self._matcher = llguidance.LLMatcher(vocabulary.library, HEADER + rules, log_level=0, limits=limits)
        self.allowed()  # tells of a bad grammar, and of one that nothing fulfills

    def allowed(self) -> np.ndarray:
        """Bits of the tokens that may come next, (W,) uint32. Raises UserError where nothing may."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        allowed_W = fit(bits, self._vocab_size)
        stuck = self._matcher.stop_reason().startswith("NoExtension") and not self._matcher.is_accepting()
        if stuck or not (allowed_W.any() or self._matcher.is_error()):
            raise UserError(f"{self._what}: {UNFULFILLED}")
        self._check()
        return allowed_W

    def accept(self, token: int) -> None:
        """Goes on behind a token. Raises UserError where it was not allowed."""
        if not self._matcher.consume_token(token):
            self._check()
            raise UserError(f"{self._what}: token {token} is not allowed here")

    def forced(self) -> list[int]:
        """Tokens that spell what the grammar leaves no choice about, but for those that what follows may join."""
        probe = self._matcher.deep_copy()  # to ask for forced bytes where a control token comes next breaks a matcher
        spelled = probe.compute_ff_bytes()  # first: the tokens are known only behind it
        tokens = probe.compute_ff_tokens()
        if probe.is_error() or not spelled.startswith(self._library.decode_bytes(tokens)):
            return []  # SentencePiece writes a space in front of a text, which is none of its own
        tokens = tokens[: self._matcher.deep_copy().validate_tokens(tokens)]
        beyond = (at for at, token in enumerate(tokens) if token >= self._vocab_size)
        return tokens[: next(beyond, len(tokens))]

    def _check(self) -> None:
        error = self._matcher.get_error()
        if error:
            why = UNFULFILLED if error.startswith("NoExtension") else tool_grammar.one_line(error)
            raise UserError(f"{self._what}: {why}")


class UntilToolCall:
    """Anything, until the token that begins a call.

    forbidden: a token that may never come. begin, then, late: the token with which another constraint takes over, and
    whether it may come behind others.
    """

    def __init__(
        self,
        vocabulary: TokenBytes,
        forbidden: int | None = None,
        begin: int | None = None,
        then: Constraint | None = None,
        late: bool = True,
    ):
        self._begin, self._then, self._late = begin, then, late
        everything = np.full(words(vocabulary.vocab_size), 0xFFFFFFFF, np.uint32)
        self._any_W = fit(everything, vocabulary.vocab_size)
        closed = forbidden if begin is None else begin
        self._rest_W = self._any_W.copy()
        if closed is not None and closed < vocabulary.vocab_size:
            self._rest_W[closed // 32] &= ~np.uint32(1 << closed % 32)
        self._allowed_W = self._any_W if forbidden is None else self._rest_W
        self._begun = False

    def allowed(self) -> np.ndarray:
        """Bits of the tokens that may come next, (W,) uint32."""
        return self._then.allowed() if self._begun and self._then else self._allowed_W

    def forced(self) -> list[int]:
        """Those of the other constraint, once it has begun."""
        return self._then.forced() if self._begun and self._then else []

    def accept(self, token: int) -> None:
        """Goes on behind a token."""
        self._begun = self._begun or token == self._begin
        if self._begun and self._then:
            self._then.accept(token)
        elif not self._late:
            self._allowed_W = self._rest_W


def words(vocab_size: int) -> int:
    """How many words of 32 bits hold a bit for each token."""
    return -(-vocab_size // 32)


def fit(bits: np.ndarray, vocab_size: int) -> np.ndarray:
    """A mask of as many words as the vocabulary needs, with no bit beyond it; (W,) uint32."""
    allowed_W = np.zeros(words(vocab_size), np.uint32)
    shared = min(len(bits), len(allowed_W))
    allowed_W[:shared] = bits[:shared]
    if vocab_size % 32:
        allowed_W[-1] &= np.uint32((1 << vocab_size % 32) - 1)
    return allowed_W
