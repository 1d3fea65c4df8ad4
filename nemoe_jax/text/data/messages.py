"""Messages of data sets in the form that chats are rendered from: roles, tool calls with ids, tools, and loss marks."""

import json
import re
from collections.abc import Mapping
from typing import Any

from nemoe_jax.text.chat.tools import short_id

Message = dict[str, Any]
Row = Mapping[str, Any]

ROLES = {  # what data sets call the roles, in small letters
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
CALLING = ("function_call", "tool_call", "tool_calls")  # roles whose content is a call
MARKS = ("weight", "train", "training", "loss")  # keys that say whether an answer is to be learned
DETAILS = "train_detail"  # the same for stretches of its text
WORDS = {"true": True, "false": False, "1": True, "0": False}


class BadRow(ValueError):
    """Why a row is no document; the reader adds where it stands."""


class EmptyRow(BadRow):
    """A row without text."""


def read_message(message: Any, where: str) -> Message:
    """A message as OpenAI writes it, from that form or ShareGPT's.

    Raises:
        BadRow: not an object, an unknown role, or marks and calls of another form.
    """
    if not isinstance(message, Mapping):
        raise BadRow(f"{where}: expected an object with role and content, got {shown(message)}")
    plain = {key: value for key, value in message.items() if value is not None}
    sharegpt = "from" in plain or "value" in plain
    speaker = plain.pop("from", plain.get("role"))
    if "value" in plain and "content" not in plain:
        plain["content"] = plain.pop("value")
    name = speaker.strip().lower() if isinstance(speaker, str) else speaker
    if not isinstance(name, str) or name not in ROLES:
        key = "from" if sharegpt else "role"
        raise BadRow(f"{where}: {key}: expected one of {', '.join(ROLES)}, got {shown(speaker)}")
    plain["role"] = ROLES[name]
    if sharegpt and not isinstance(plain.get("content"), str):
        raise BadRow(f"{where}: value: expected a text, got {shown(plain.get('content'))}")
    if name in CALLING and "tool_calls" not in plain:
        plain |= {"content": None, "tool_calls": parsed(plain.get("content"), f"{where}: a call")}
    if "function_call" in plain:  # OpenAI's first form of calls
        plain["tool_calls"] = plain.pop("function_call")
    if isinstance(plain.get("tool_calls"), str):
        plain["tool_calls"] = parsed(plain["tool_calls"], f"{where}: tool_calls")
    marks = loss_marks(plain, where) if plain["role"] == "assistant" else {}
    return {key: value for key, value in plain.items() if key not in (*MARKS, DETAILS)} | marks


def loss_marks(message: Row, where: str) -> Message:
    """What a data set says about learning an answer: {"weight": 0} for not at all, `train_detail` for stretches of it.

    `weight` is OpenAI's and `train`, `training` and `train_detail` are axolotl's; `loss` is that of ms-swift. All are
    true unless they say otherwise.
    """
    for key in MARKS:
        value = message.get(key)
        value = WORDS.get(value.lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool | int | float | None):
            raise BadRow(f"{where}: {key}: expected true or false, got {shown(value)}")
        if value is not None and not value:
            return {"weight": 0}
    details = message.get(DETAILS)
    details = parsed(details, f"{where}: {DETAILS}") if isinstance(details, str) else details
    if not details:
        return {}
    kinds = {"begin_offset": int, "end_offset": int, "train": bool}
    if not isinstance(details, list) or not all(
        isinstance(one, Mapping) and all(isinstance(one.get(key), kind) for key, kind in kinds.items())
        for one in details
    ):
        raise BadRow(f"{where}: {DETAILS}: expected objects with {', '.join(kinds)}, got {shown(details)}")
    return {DETAILS: [{key: one[key] for key in kinds} for one in details]}


def name_calls(messages: list[Message]) -> list[Message]:
    """The messages with tool calls in one form, each call and its result with an id of nine letters and digits.

    Calls that follow one another as messages of their own become one message.
    """
    named: list[Message] = []
    pending: list[str] = []
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            given = message.get("tool_call_id")
            unnamed = pending.pop(0) if given is None and pending else ""
            named.append({**message, "tool_call_id": unnamed if given is None else short_id(str(given))})
        elif message["role"] == "assistant" and message.get("tool_calls"):
            calls = message["tool_calls"]
            calls = [_call(call, at, n) for n, call in enumerate(calls if isinstance(calls, list) else [calls])]
            before = named[-1] if named else {}
            alike = before.get("weight") == message.get("weight")
            if before.get("tool_calls") and not before.get("content") and not message.get("content") and alike:
                calls = before["tool_calls"] + calls
                named.pop()
            pending = [call["id"] for call in calls]
            named.append({**message, "tool_calls": calls})
        else:
            named.append(message)
    return named


def _call(call: Any, at: int, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRow(f"messages[{at}]: tool_calls: expected objects with name and arguments, got {shown(call)}")
    return {
        "id": short_id(str(call.get("id") or f"{at}.{number}")),
        "type": "function",
        "function": {"name": function["name"], "arguments": function.get("arguments") or {}},
    }


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Tools as objects of type function, from a list (or its JSON text) of such or of bare functions."""
    if not value:
        return None
    value = parsed(value, "tools") if isinstance(value, str) else value
    if not isinstance(value, list):
        raise BadRow(f"tools: expected a list, got {shown(value)}")
    tools = [parsed(tool, f"tools[{at}]") if isinstance(tool, str) else tool for at, tool in enumerate(value)]
    for at, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or not isinstance(tool.get("function", tool), Mapping):
            raise BadRow(f"tools[{at}]: expected an object with a function, got {shown(tool)}")
    return [
        dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools
    ] or None


def parsed(text: Any, where: str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"{where}: expected JSON, got {shown(text)}") from error


def shown(value: Any) -> str:
    """A value as an error shows it: on one line, and not too long."""
    return re.sub(r"\s+", " ", f"{value!r:.60}")
