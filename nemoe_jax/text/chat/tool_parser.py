"""A model's response read back: its text, and the calls of tools in it.

    parsed = parse_tool_calls(tokenizer, tokens, tools)
    parsed.text, parsed.calls, parsed.warnings

Nothing that a model writes is an error. A call that cannot be read (no JSON, no proper name, arguments that are no
object) stays in the text, with a warning. A call of a function that is not among the tools is still a call, with a
warning: its caller can tell the model so. Where no tools were given, everything is text.
"""

import dataclasses
import json
import secrets
import string
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from nemoe_jax.text.chat.tool_formats import ToolCallFormat, call_form
from nemoe_jax.text.chat.tools import CALL_ID, NAME
from nemoe_jax.text.tokenizers.base import Tokenizer

LETTERS_AND_DIGITS = string.ascii_letters + string.digits


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of a tool: `id` has nine letters or digits, `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str

    def as_message(self) -> dict[str, Any]:
        """The call as messages hold it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclasses.dataclass(frozen=True)
class ParsedAnswer:
    """What a response says and calls, and what was odd about it."""

    text: str
    calls: tuple[ToolCall, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_message(self) -> dict[str, Any]:
        """The response as a message of a chat."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text or (None if self.calls else "")}
        return {**message, "tool_calls": [call.as_message() for call in self.calls]} if self.calls else message


def parse_tool_calls(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    tools: Sequence[Mapping[str, Any]] | None,
    end_tokens: Sequence[int] = (),
) -> ParsedAnswer:
    """The text and the calls of a response; never raises, whatever the tokens are.

    tokens: the response's, with or without its end token. end_tokens: what ends it besides the tokenizer's own.
    tools: as `check_tools` lets them pass.
    """
    tokens = readable(tokenizer, tokens, end_tokens)
    form = call_form(tokenizer) if tools else None
    if form is None or not tools:
        return ParsedAnswer(tokenizer.decode(tokens))
    return _Reader(tokenizer, form, tools).read(tokens)


class ToolCallStreamParser:
    """Reads a response piece by piece: its text can be sent at once, until a call begins.

    `push` gives the text that is certain to be text, `finish` the rest of it with the calls. The text is what was
    pushed, so it ends before a stop string, as that does.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] | None, end_tokens: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._tools = tools
        self._form = call_form(tokenizer) if tools else None
        self._start = self._form.start if self._form else None
        self._before: list[int] = []  # the tokens before the first call
        self._calls: list[int] = []  # those from its first token on
        self._text = ""  # all that came, or before calls that begin with a control token
        self._sent = 0  # characters of it

    def push(self, new_text: str, tokens: list[int]) -> str:
        """The text that can be sent now that these tokens came, and this text, which may lag behind them."""
        if self._calls:
            self._calls += tokens
            return ""
        if isinstance(self._start, int) and self._start in tokens:
            at = tokens.index(self._start)
            self._before += tokens[:at]
            self._calls = tokens[at:]
            text = self._tokenizer.decode(readable(self._tokenizer, self._before, ()))
            # the pieces lag behind the tokens; of this one, only what stands before the call is text
            self._text = text if text.startswith(self._text) else self._text
            return self._send(len(self._text))
        self._before += tokens
        self._text += new_text
        if not isinstance(self._start, str):
            return self._send(len(self._text))
        begun = self._text.find(self._start, max(0, self._sent))
        if begun < 0:
            begun = len(self._text) - unfinished(self._text, self._start)
        return self._send(begun)

    def finish(self) -> ParsedAnswer:
        """The text that was not sent yet, and the calls."""
        if self._form is None or not self._tools:
            return ParsedAnswer(self._text[self._sent :])
        reader = _Reader(self._tokenizer, self._form, self._tools)
        if isinstance(self._start, str):
            return reader.read_tagged(self._text[self._sent :])
        return reader.read(readable(self._tokenizer, self._calls, self._end_tokens))

    def _send(self, end: int) -> str:
        text, self._sent = self._text[self._sent : end], max(self._sent, end)
        return text


def readable(tokenizer: Tokenizer, tokens: Sequence[int], end_tokens: Sequence[int]) -> list[int]:
    """The tokens that the tokenizer has, up to the end token."""
    kept = [token for token in tokens if 0 <= token < tokenizer.vocab_size]
    while kept and (kept[-1] == tokenizer.eos_id or kept[-1] in end_tokens):
        kept.pop()
    return kept


def unfinished(text: str, tag: str) -> int:
    """How many characters at the end of a text may be the beginning of a tag."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


class _Malformed(ValueError):
    """Why a call cannot be read."""


class _Reader:
    """Collects the text and the calls of one response."""

    def __init__(self, tokenizer: Tokenizer, form: ToolCallFormat, tools: Sequence[Mapping[str, Any]]):
        self.tokenizer = tokenizer
        self.form = form
        self.names = {tool["function"]["name"] for tool in tools}
        self.texts: list[str] = []
        self.calls: list[ToolCall] = []
        self.warnings: list[str] = []

    def read(self, tokens: list[int]) -> ParsedAnswer:
        """The text and the calls of tokens."""
        if self.form.kind == "tagged":
            return self.read_tagged(self._with_tags(tokens))
        parts = _split(tokens, self.form.start)
        self.texts.append(self.tokenizer.decode(next(parts)))
        for part in parts:
            if self.form.kind == "list":
                self._read_list(self.tokenizer.decode(part))
            else:
                self._read_marked(part)
        return self._result(tokens)

    def read_tagged(self, text: str) -> ParsedAnswer:
        """The text and the calls of a text with tags."""
        start, end = self._tags()
        before, *parts = text.split(start)
        self.texts.append(before)
        for part in parts:
            body, closed, after = part.partition(end)
            try:
                if not closed:
                    raise _Malformed(f"no {end} behind it")
                self._add(_json(body))
            except _Malformed as error:
                self._keep(start + part, str(error))
            else:
                self.texts.append(after if after.strip() else "")
        if not self.calls:
            return ParsedAnswer(text, (), tuple(self.warnings))
        return ParsedAnswer("".join(self.texts), tuple(self.calls), tuple(self.warnings))

    def _result(self, tokens: list[int]) -> ParsedAnswer:
        text = "".join(self.texts) if self.calls else self.tokenizer.decode(tokens)
        return ParsedAnswer(text, tuple(self.calls), tuple(self.warnings))

    def _tags(self) -> tuple[str, str]:
        names = {token: name for name, token in self.tokenizer.control.items()}
        start, end = (mark if isinstance(mark, str) else names[mark] for mark in (self.form.start, self.form.end))
        return start, end

    def _with_tags(self, tokens: list[int]) -> str:
        """The text of tokens, with the tags that are control tokens."""
        tags = {token for token in (self.form.start, self.form.end) if isinstance(token, int)}
        runs = groupby(tokens, tags.__contains__)
        return "".join(self.tokenizer.decode(run, skip_special=not tagged) for tagged, run in runs)

    def _read_list(self, text: str) -> None:
        body = text.lstrip()
        try:
            calls, end = _DECODER.raw_decode(body)
        except (ValueError, RecursionError) as error:
            return self._keep(text, f"not JSON ({error})")
        for call in calls if isinstance(calls, list) else [calls]:
            try:
                self._add(call)
            except _Malformed as error:
                self._keep(_shown(call), str(error))
        if body[end:].strip():
            self._keep(body[end:], "text behind the calls")

    def _read_marked(self, tokens: list[int]) -> None:
        head, *bodies = _split(tokens, self.form.arguments)
        name, *ids = (self.tokenizer.decode(part).strip() for part in _split(head, self.form.call_id))
        try:
            if len(bodies) != 1:
                raise _Malformed(f"expected arguments behind one [ARGS], got {len(bodies)}")
            self._add({"name": name, "arguments": _json(self.tokenizer.decode(bodies[0])), "id": "".join(ids)})
        except _Malformed as error:
            self._keep(self.tokenizer.decode(tokens), str(error))

    def _add(self, call: Any) -> None:
        """One more call. Raises _Malformed where it is none."""
        if not isinstance(call, Mapping):
            raise _Malformed(f"expected an object with name and arguments, got {type(call).__name__}")
        name, arguments, identity = call.get("name"), call.get("arguments", {}), call.get("id")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise _Malformed(f"name: expected 1 to 64 letters, digits, _ and -, got {name!r:.80}")
        if isinstance(arguments, str):
            arguments = _json(arguments)
        if not isinstance(arguments, Mapping):
            raise _Malformed(f"arguments: expected an object, got {type(arguments).__name__}")
        try:
            written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            written.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which no UTF-8 has
            written = json.dumps(arguments)
        except (ValueError, RecursionError) as error:
            raise _Malformed(f"arguments: {error}") from error
        if name not in self.names:
            self.warnings.append(f"call {len(self.calls) + 1}: no tool has the name {name}")
        taken = {other.id for other in self.calls}
        if not isinstance(identity, str) or not CALL_ID.fullmatch(identity) or identity in taken:
            identity = new_call_id()
        self.calls.append(ToolCall(identity, name, written))

    def _keep(self, text: str, why: str) -> None:
        self.texts.append(text)
        self.warnings.append(f"a tool call was left as text: {why}"[:300])


def new_call_id() -> str:
    """An id for a call: nine letters and digits by chance."""
    return "".join(secrets.choice(LETTERS_AND_DIGITS) for _ in range(9))


def _split(tokens: Sequence[int], mark: int | str | None) -> Iterator[list[int]]:
    """Runs of tokens between marks, one more than there are marks."""
    run: list[int] = []
    for token in tokens:
        if token == mark:
            yield run
            run = []
        else:
            run.append(token)
    yield run


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "…"


def _no_number(text: str) -> None:
    raise _Malformed(f"{text} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number)


def _json(text: str) -> Any:
    """The value of a JSON text. Raises _Malformed."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"not JSON ({error})") from error
