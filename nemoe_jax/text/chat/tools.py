"""Tools in Mistral's chat format: what may be called, the calls of a response, and their results.

All three are JSON, encoded as text between control tokens that only this format writes. In `v3`:

    [AVAILABLE_TOOLS][{"type": "function", "function": {…}}][/AVAILABLE_TOOLS]   before the last question
    [TOOL_CALLS][{"name": "weather", "arguments": {"city": "Graz"}, "id": "a1b2c3d4e"}]</s>
    [TOOL_RESULTS]{"content": 21.5, "call_id": "a1b2c3d4e"}[/TOOL_RESULTS]

Newer formats put names and ids between control tokens of their own. A call's id has exactly nine letters or digits up
to v11; other ids, such as OpenAI's `call_…`, are mapped to such by `nine_character_ids`. The reference is
mistral-common; the tests compare ids.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemoe_jax.errors import UserError
from nemoe_jax.text.tokenizers.base import Tokenizer

OLDEST_WITH_TOOLS = 3
MOST_TOOLS = 128
CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_UNNAMED = (None, "", "null")  # how a call says that it has no id


def nine_character_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a chat with every tool call's id, and every reference to one, brought to nine letters and digits.

    An id that is of that form stays; any other becomes the beginning of its hash, the same wherever it occurs. What is
    not a string is left as it is, for the checks to name.
    """

    def short(holder: Mapping[str, Any], key: str) -> dict[str, Any]:
        given = holder.get(key)
        return {**holder, key: short_id(given)} if isinstance(given, str) and given not in _UNNAMED else dict(holder)

    mapped = []
    for message in messages:
        changed = short(message, "tool_call_id")
        calls = changed.get("tool_calls")
        if isinstance(calls, Sequence) and not isinstance(calls, str):
            changed["tool_calls"] = [short(call, "id") if isinstance(call, Mapping) else call for call in calls]
        mapped.append(changed)
    return mapped


def short_id(name: str) -> str:
    """The name itself if it has exactly nine letters and digits, as Mistral's format needs; else nine of its hash."""
    if CALL_ID.fullmatch(name):
        return name
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def place(at: int) -> str:
    """How an error names a message."""
    return f"messages[{at}]"


def check_tool_list(tools: Any) -> None:
    """Raises UserError unless this is a list of objects, or None."""
    if tools is None:
        return
    if (
        not isinstance(tools, Sequence)
        or isinstance(tools, str)
        or not all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise UserError(f"tools: expected a list of objects with a function, got {tools!r:.80}")


def check_tools(tools: Any) -> None:
    """Raises UserError unless these are tools that a model can be told of, or None."""
    check_tool_list(tools)
    if tools and len(tools) > MOST_TOOLS:
        raise UserError(f"tools: expected at most {MOST_TOOLS}, got {len(tools)}")
    names: set[str] = set()
    for at, tool in enumerate(tools or []):
        where, function = f"tools[{at}].function", tool.get("function")
        if tool.get("type", "function") != "function":
            raise UserError(f"tools[{at}].type: expected function, got {tool['type']!r:.80}")
        if not isinstance(function, Mapping):
            raise UserError(f"{where}: expected an object with a name, got {function!r:.80}")
        name, about, parameters = (function.get(key) for key in ("name", "description", "parameters"))
        _check_name(where, name)
        if str(name) in names:
            raise UserError(f"{where}.name: two tools with the name {name}")
        if not isinstance(about, str | None):
            raise UserError(f"{where}.description: expected a text, got {about!r:.80}")
        if not isinstance(parameters, Mapping | None):
            raise UserError(f"{where}.parameters: expected a JSON schema (an object), got {parameters!r:.80}")
        if parameters and parameters.get("type", "object") != "object":
            raise UserError(f"{where}.parameters.type: expected object, got {parameters['type']!r:.80}")
        names.add(str(name))


def check_tool_choice(tool_choice: Any, tools: Sequence[Mapping[str, Any]] | None) -> tuple[str, str | None]:
    """Whether tools are to be called: `none`, `auto` or `required`, and the name of the only one that may be.

    tool_choice: one of these (`any` is Mistral's word for required), `{"type": "function", "function": {"name": …}}`,
        or None, which means auto where there are tools.
    tools: as `check_tools` lets them pass. Raises UserError.
    """
    names = [tool["function"]["name"] for tool in tools or []]
    chosen = tool_choice if tool_choice is not None else "auto" if names else "none"
    name = None
    if isinstance(chosen, Mapping):
        function = chosen.get("function")
        if chosen.get("type") != "function" or not isinstance(function, Mapping):
            raise UserError(f"tool_choice: expected the type function and a function with a name, got {chosen!r:.80}")
        name = function.get("name")
        if name not in names:
            raise UserError(f"tool_choice.function.name: expected the name of a tool that is given, got {name!r:.80}")
    elif chosen not in ("none", "auto", "required", "any"):
        raise UserError(f"tool_choice: expected none, auto, required or a function, got {chosen!r:.80}")
    mode = chosen if chosen in ("none", "auto") else "required"
    if mode == "required" and not names:
        raise UserError("tool_choice: expected none or auto where no tools are given")
    return mode, name


def check_calls(messages: Sequence[Mapping[str, Any]], version: int) -> None:
    """Raises UserError where calls are malformed or lack ids, or calls and results do not belong together."""
    pending: list[str] = []
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            wanted = message.get("tool_call_id")
            if wanted not in pending:
                raise UserError(
                    f"{place(at)}.tool_call_id: expected the id of a call without a result, got {wanted!r:.80}"
                )
            pending.remove(wanted)
        elif message["role"] == "assistant":
            if pending:
                raise UserError(f"{place(at)}: a response before the results of the calls {', '.join(pending)}")
            pending = [str(call["id"]) for call in _calls(message, at, version, last=at == len(messages) - 1)]


def _calls(message: Mapping[str, Any], at: int, version: int, last: bool) -> list[Mapping[str, Any]]:
    """The calls of a response that have an id, all of them checked."""
    calls, where = message.get("tool_calls") or [], f"{place(at)}.tool_calls"
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UserError(f"{where}: expected a list, got {calls!r:.80}")
    if calls and version < OLDEST_WITH_TOOLS:
        raise UserError(f"{where}: chat format v{version} has no tool calls; v{OLDEST_WITH_TOOLS} and newer have")
    named: list[Mapping[str, Any]] = []
    for number, call in enumerate(calls):
        one = f"{where}[{number}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str | Mapping | None):
            raise UserError(f"{one}: expected a function with name and arguments, got {call!r:.80}")
        _check_name(f"{one}.function", function.get("name"))
        if call.get("id") in _UNNAMED and last:  # a response that ends the chat may leave it out
            continue
        if not isinstance(call.get("id"), str) or call["id"] in _UNNAMED:
            raise UserError(f"{one}.id: expected a string, got {call.get('id')!r:.80}")
        if any(call["id"] == other["id"] for other in named):
            raise UserError(f"{one}.id: two calls with the id {call['id']}")
        named.append(call)
    return named


def _check_name(where: str, name: Any) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{where}.name: expected 1 to 64 letters, digits, _ and -, got {name!r:.80}")


def tool_parts(tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]) -> list[str | int]:
    """What may be called, of tools that have been checked."""
    functions = [tool["function"] for tool in tools]
    listed = [
        {
            "type": "function",
            "function": {
                "name": function["name"],
                "description": function.get("description") or "",
                "parameters": function.get("parameters") or {},
            },
        }
        for function in functions
    ]
    return [
        tokenizer.control_id("[AVAILABLE_TOOLS]"),
        json.dumps(listed, ensure_ascii=False),
        tokenizer.control_id("[/AVAILABLE_TOOLS]"),
    ]


def call_parts(tokenizer: Tokenizer, version: int, calls: Sequence[Mapping[str, Any]]) -> list[str | int]:
    """The calls of a response, without its end token."""
    if not calls:
        return []
    plain: list[dict[str, Any]] = []
    for call in calls:
        arguments = call["function"].get("arguments")
        parsed = parsed_json(arguments or "{}") if isinstance(arguments, str | None) else arguments
        plain.append({"name": call["function"]["name"], "arguments": parsed})
        if call.get("id") not in _UNNAMED:
            plain[-1]["id"] = call["id"]
    start = tokenizer.control_id("[TOOL_CALLS]")
    if version < 11:
        return [start, json.dumps(plain, ensure_ascii=False)]
    parts: list[str | int] = []
    for call in plain:
        parts += [start, call["name"]]
        if version < 13 and "id" in call:
            parts += [tokenizer.control_id("[CALL_ID]"), call["id"]]
        parts += [tokenizer.control_id("[ARGS]"), json.dumps(call["arguments"], ensure_ascii=False)]
    return parts


def result_parts(tokenizer: Tokenizer, version: int, call_id: str, text: str) -> list[str | int]:
    """What a called tool gave."""
    content: list[str | int] = [text]
    if version < 7:
        content = [json.dumps({"content": parsed_json(text or "{}"), "call_id": call_id}, ensure_ascii=False)]
    elif version < 13:
        content = [call_id, tokenizer.control_id("[TOOL_CONTENT]"), text]
    return [tokenizer.control_id("[TOOL_RESULTS]"), *content, tokenizer.control_id("[/TOOL_RESULTS]")]


def parsed_json(text: str) -> Any:
    """The value of a JSON text, or the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
