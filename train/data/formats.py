"""Rows of data sets as documents: a text, or a chat with the messages that `nemoe_jax.chat` renders.

    {"text": …}                                                        text
    {"conversations": [{"from": "human", "value": …}, …]}              sharegpt (OpenHermes, FineTome, Magpie, Stheno)
    {"messages": [{"role": "user", "content": …}, …], "tools": […]}    messages (OpenAI)
    {"instruction": …, "input": …, "output": …}                        alpaca (Open-Platypus)
    {"query": …, "response": …}                                        metamath

Other columns are ignored. A row that fits none of them, or has no answer to learn from, raises `BadRow`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nemoe_jax.errors import UserError
from nemoe_jax.text.chat.render import check, check_order, text_of
from nemoe_jax.text.chat.tools import CALL_ID

Message = dict[str, Any]
Row = Mapping[str, Any]

# Keys by which `auto` tells the formats, the surest first: Magpie-Pro has conversations, instruction and response.
KEYS = {
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "metamath": ("query", "response"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
COLUMNS = {*(key for keys in KEYS.values() for key in keys), "input", "system", "tools"}  # all that is read
ROLES = {  # what data sets call the roles
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
}


class BadRow(ValueError):
    """Why a row is no document; the reader adds where it stands."""


class Chat(NamedTuple):
    """A conversation that ends in an answer, and the tools that it may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


Document = str | Chat


def to_document(row: Any, form: str = "auto") -> Document:
    """The document that a row holds.

    Args:
        row: an object of a JSON or Parquet file, or the whole text of a text file.
        form: a format's name, or `auto`, which goes by the keys.

    Raises:
        BadRow: not an object, keys missing or of a wrong type, empty, no answer, roles out of order.
    """
    if isinstance(row, str):
        if form not in ("auto", "text"):
            raise BadRow(f"expected a row of the format {form}, got a text")
        return _text({"text": row})
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object, got {_shown(row)}")
    return _READERS[_format_of(row) if form == "auto" else form](row)


def _format_of(row: Row) -> str:
    for form, keys in KEYS.items():
        if all(row.get(key) is not None for key in keys):
            return form
    raise BadRow(f"the keys {', '.join(map(str, row)) or '(none)'} belong to no known format")


def _text(row: Row) -> str:
    return _string(row, "text")


def _alpaca(row: Row) -> Chat:
    question = _string(row, "instruction")
    if str(row.get("input") or "").strip():
        question += "\n\n" + _string(row, "input")
    return _single(row, question, _string(row, "output"))


def _metamath(row: Row) -> Chat:
    return _single(row, _string(row, "query"), _string(row, "response"))


def _single(row: Row, question: str, answer: str) -> Chat:
    return _chat(row, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _sharegpt(row: Row) -> Chat:
    messages = []
    for at, turn in enumerate(_list(row, "conversations")):
        if not isinstance(turn, Mapping):
            raise BadRow(f"conversations[{at}]: expected an object with from and value, got {_shown(turn)}")
        speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(value, str):
            raise BadRow(f"conversations[{at}]: value: expected a text, got {_shown(value)}")
        message: Message = {"role": _role(speaker, f"conversations[{at}]: from"), "content": value}
        if speaker == "function_call":
            message |= {"content": None, "tool_calls": _parsed(value, f"conversations[{at}]: value")}
        messages.append(_weighted(message, turn))
    return _chat(row, messages)


def _messages(row: Row) -> Chat:
    messages = []
    for at, message in enumerate(_list(row, "messages")):
        if not isinstance(message, Mapping):
            raise BadRow(f"messages[{at}]: expected an object with role and content, got {_shown(message)}")
        plain = {key: value for key, value in message.items() if value is not None and key != "weight"}
        plain["role"] = _role(message.get("role"), f"messages[{at}]: role")
        if "function_call" in plain:  # OpenAI's first form of calls
            plain["tool_calls"] = plain.pop("function_call")
        messages.append(_weighted(plain, message))
    return _chat(row, messages)


_READERS: dict[str, Callable[[Row], Document]] = {
    "text": _text,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "alpaca": _alpaca,
    "metamath": _metamath,
}


def _chat(row: Row, messages: list[Message]) -> Chat:
    """The chat of these messages, checked; questions after the last answer teach nothing and are left out."""
    system = row.get("system")
    if isinstance(system, str) and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    messages = [
        message for message in messages if message["role"] != "system" or str(message.get("content") or "").strip()
    ]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not any(message["role"] == "assistant" and message.get("weight") != 0 for message in messages):
        raise BadRow("no answer to learn from")
    _name_calls(messages)
    try:
        check(messages)
        check_order(messages)
        for at, message in enumerate(messages):
            if not text_of(message, at).strip() and message["role"] != "tool" and not message.get("tool_calls"):
                raise BadRow(f"messages[{at}]: empty")
    except UserError as error:
        raise BadRow(str(error)) from error
    return Chat(messages, _tools(row.get("tools")))


def _name_calls(messages: list[Message]) -> None:
    """Brings tool calls into one form, and gives them and their results ids of nine letters and digits."""
    pending: list[str] = []
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            given = message.get("tool_call_id")
            unnamed = pending.pop(0) if given is None and pending else ""
            message["tool_call_id"] = unnamed if given is None else call_id(str(given))
        elif message["role"] == "assistant" and message.get("tool_calls"):
            calls = message["tool_calls"]
            calls = calls if isinstance(calls, list) else [calls]
            message["tool_calls"] = [_call(call, at, number) for number, call in enumerate(calls)]
            pending = [call["id"] for call in message["tool_calls"]]


def _call(call: Any, at: int, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"messages[{at}]: tool_calls: expected objects with name and arguments, got {_shown(call)}")
    return {
        "id": call_id(str(call.get("id") or f"{at}.{number}")),
        "type": "function",
        "function": {"name": function["name"], "arguments": function.get("arguments") or {}},
    }


def call_id(name: str) -> str:
    """The name itself if it has exactly nine letters and digits, as Mistral's format wants; else nine of its hash."""
    if CALL_ID.fullmatch(name):
        return name
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Tools as objects of type function, from a list (or its JSON text) of such or of bare functions."""
    if not value:
        return None
    value = _parsed(value, "tools") if isinstance(value, str) else value
    if not isinstance(value, list):
        raise BadRow(f"tools: expected a list, got {_shown(value)}")
    tools = [_parsed(tool, f"tools[{at}]") if isinstance(tool, str) else tool for at, tool in enumerate(value)]
    for at, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or not isinstance(tool.get("function", tool), Mapping):
            raise BadRow(f"tools[{at}]: expected an object with a function, got {_shown(tool)}")
    return [
        dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools
    ] or None


def _weighted(message: Message, turn: Row) -> Message:
    """The message, with weight 0 where the data set says that this answer is not to be learned."""
    return {**message, "weight": 0} if message["role"] == "assistant" and turn.get("weight") == 0 else message


def _role(name: Any, where: str) -> str:
    if not isinstance(name, str) or name not in ROLES:
        raise BadRow(f"{where}: expected one of {', '.join(ROLES)}, got {_shown(name)}")
    return ROLES[name]


def _list(row: Row, key: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list) or not value:
        raise BadRow(f"{key}: expected a list of messages, got {_shown(value)}")
    return value


def _string(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(f"{key}: expected a text, got {_shown(value)}")
    if not value.strip():
        raise BadRow(f"{key}: empty")
    return value


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: expected JSON, got {_shown(text)}") from error


def _shown(value: Any) -> str:
    """A value as an error shows it: on one line, and not too long."""
    return re.sub(r"\s+", " ", f"{value!r:.60}")
