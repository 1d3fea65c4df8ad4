"""Rows of data sets as documents: a text, a prompt with its completion, or a chat for `nemoe_jax.text.chat`.

    {"text": …}                                                        text
    {"conversations": [{"from": "human", "value": …}, …]}              sharegpt (OpenHermes, FineTome, Magpie, Stheno)
    {"messages": [{"role": "user", "content": …}, …], "tools": […]}    messages (OpenAI)
    {"prompt": …, "completion": …}                                     prompt-completion (TRL): strings or messages
    {"instruction": …, "input": …, "output": …, "history": […]}        alpaca (Open-Platypus, LLaMA-Factory)
    {"instruction": …, "context": …, "response": …}                    instruction-response (Dolly)
    {"query": …, "response": …}                                        metamath
    {"question": …, "answer": …}                                       question-answer (GSM8K)
    {"system_prompt": …, "question": …, "response": …}                 question-response (OpenOrca)
    {"prompt": …, "response": …}                                       prompt-response

Other columns are ignored. A row that fits none of them, or has no answer to learn from, raises `BadRow`. Messages that
a data set marks as not to be learned keep that mark (see `messages.loss_marks`).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from nemoe_jax.errors import UserError
from nemoe_jax.text.chat.render import check, check_order, text_of
from nemoe_jax.text.data.messages import (
    BadRow,
    EmptyRow,
    Message,
    Row,
    name_calls,
    parsed,
    read_message,
    read_tools,
    shown,
)

# Keys by which `auto` tells the formats, the surest first: Magpie-Pro has conversations, instruction and response.
KEYS = {
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "metamath": ("query", "response"),
    "alpaca": ("instruction", "output"),
    "instruction-response": ("instruction", "response"),
    "question-answer": ("question", "answer"),
    "question-response": ("question", "response"),
    "prompt-response": ("prompt", "response"),
    "text": ("text",),
}
BESIDE = ("input", "context", "history", "system", "system_prompt", "tools", "label")
PAIRS = ("chosen", "rejected", "score_chosen", "score_rejected", "completions")  # of preference data, for training
COLUMNS = {*(key for keys in KEYS.values() for key in keys), *BESIDE, *PAIRS}  # all that is read
LISTS_OF_OBJECTS = ("conversations", "messages", "prompt", "completion")


class Chat(NamedTuple):
    """A conversation that ends in an answer, and the tools that it may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


class Completion(NamedTuple):
    """A plain text whose beginning is given: only what follows it is to be learned."""

    prompt: str
    completion: str


Document = str | Completion | Chat


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
        raise BadRow(f"expected an object, got {shown(row)}")
    if exported_from_arrow(row):
        row = without_nulls(row)
    form = _format_of(row) if form == "auto" else form
    if form in _PAIRS:
        return _pair(row, *_PAIRS[form])
    return _READERS[form](row)


def _format_of(row: Row) -> str:
    for form, keys in KEYS.items():
        if all(row.get(key) is not None for key in keys):
            return form
    raise BadRow(f"the keys {', '.join(map(str, row)) or '(none)'} belong to no known format")


def _text(row: Row) -> str:
    return _string(row, "text")


def _pair(row: Row, asked: str, answered: str) -> Chat:
    """A question, perhaps with turns before it and a context below it, and its answer."""
    question = _string(row, asked)
    if str(row.get("input") or "").strip():
        question += "\n\n" + _string(row, "input")
    if isinstance(row.get("context"), str) and row["context"].strip():  # elsewhere a list of passages
        question += "\n\n" + row["context"]
    messages: list[Message] = []
    for at, turn in enumerate(_history(row)):
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise BadRow(f"history[{at}]: expected a question and its answer, got {shown(turn)}")
        messages += _exchange(*turn)
    return _chat(row, messages + _exchange(question, _string(row, answered)))


def _history(row: Row) -> list[Any]:
    value = row.get("history") or []
    value = parsed(value, "history") if isinstance(value, str) else value
    if not isinstance(value, list):
        raise BadRow(f"history: expected a list of questions with answers, got {shown(value)}")
    return value


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _completion(row: Row) -> Document:
    """As TRL reads it: strings are plain text, messages a chat; the loss is that of the completion alone."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if row.get("label") is False:  # of KTO: completions to be avoided
        raise BadRow("label: false: a completion that is not wanted; expected rows to be learned")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise EmptyRow("completion: empty")
        return Completion(prompt, completion)
    asked = _read(row, "prompt") if not isinstance(prompt, str) else [{"role": "user", "content": prompt}]
    answer = _read(row, "completion") if not isinstance(completion, str) else _exchange("", completion)[1:]
    given = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in asked]
    return _chat(row, given + answer)


def _read(row: Row, key: str) -> list[Message]:
    """The messages in a list, or in its JSON text."""
    value = row.get(key)
    value = parsed(value, key) if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise BadRow(f"{key}: expected a list of messages, got {shown(value)}")
    return [read_message(message, f"{key}[{at}]") for at, message in enumerate(value)]


def _conversations(row: Row) -> Chat:
    return _chat(row, _read(row, "conversations"))


def _messages(row: Row) -> Chat:
    return _chat(row, _read(row, "messages"))


_PAIRS = {
    name: KEYS[name]
    for name in (
        "metamath",
        "alpaca",
        "instruction-response",
        "question-answer",
        "question-response",
        "prompt-response",
    )
}
_READERS: dict[str, Callable[[Row], Document]] = {
    "text": _text,
    "sharegpt": _conversations,
    "messages": _messages,
    "prompt-completion": _completion,
}


def _chat(row: Row, messages: list[Message]) -> Chat:
    """The chat of these messages, checked; questions after the last answer teach nothing and are left out."""
    system = row.get("system", row.get("system_prompt"))
    if isinstance(system, str) and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    messages = [
        message for message in messages if message["role"] != "system" or str(message.get("content") or "").strip()
    ]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not any(message["role"] == "assistant" and message.get("weight") != 0 for message in messages):
        raise BadRow("no answer to learn from")
    messages = name_calls(messages)
    try:
        check(messages)
        check_order(messages)
        for at, message in enumerate(messages):
            if not text_of(message, at).strip() and message["role"] != "tool" and not message.get("tool_calls"):
                raise BadRow(f"messages[{at}]: empty")
    except UserError as error:
        raise BadRow(str(error)) from error
    return Chat(messages, read_tools(row.get("tools")))


def _string(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(f"{key}: expected a text, got {shown(value)}")
    if not value.strip():
        raise EmptyRow(f"{key}: empty")
    return value


def exported_from_arrow(row: Row) -> bool:
    """Whether the nulls of a JSON row are padding, as Arrow gives every object of a column the keys of all of them.

    So it is where all messages have the same keys, some of them null, or a tool has a parameter that is null.
    """
    for key in LISTS_OF_OBJECTS:
        value = row.get(key)
        if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
            continue
        if all(one.keys() == value[0].keys() for one in value) and any(None in one.values() for one in value):
            return True
    return any(None in parameters.values() for parameters in _parameters(row.get("tools")))


def _parameters(tools: Any) -> Iterator[Mapping[str, Any]]:
    for tool in tools if isinstance(tools, list) else []:
        value = tool
        for key in ("parameters", "properties"):
            value = value.get("function", value) if isinstance(value, Mapping) else None
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):
            yield value


def without_nulls(value: Any) -> Any:
    """The value without the keys that are null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
