"""Chats as token ids: Mistral's `[INST]…[/INST]` format, or the chat template of a Hugging Face directory.

    render_chat(tokenizer, [{"role": "system", "content": "You are …"}, {"role": "user", "content": "What …?"}])
    # <s>[INST]You are …\n\nWhat …?[/INST]

Mistral's format, as mistral-common encodes it (it is the reference; the tests compare ids): neighboring messages of
one role join with a blank line; the system prompts, joined likewise, go before the *last* user message (`v2`, `v3`),
before the first (`v1`), or between control tokens of their own (`v7` on); each response ends with `</s>`. Tools, their
calls and their results (`v3` on) are JSON between control tokens, in tools.py. Only these functions make
control ids: what a message spells out is encoded as text. (In `v1` the markers themselves are text.)

For training, `encode_with_assistant_mask` also returns a loss mask: true for the ids of the assistant's
responses, calls and end tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from nemoe_jax.errors import UserError
from nemoe_jax.text.chat.loss_mask import marked_parts
from nemoe_jax.text.chat.template import spoken_template_parts, template_parts
from nemoe_jax.text.chat.tools import (
    OLDEST_WITH_TOOLS,
    call_parts,
    check_calls,
    check_tool_list,
    check_tools,
    nine_character_ids,
    place,
    result_parts,
    tool_parts,
)
from nemoe_jax.text.tokenizers.base import MarkedPart, Tokenizer
from nemoe_jax.utils.json_file import read_json

Message = Mapping[str, Any]
Tool = Mapping[str, Any]
BREAK = "\n\n"
ROLES = ("system", "developer", "user", "assistant", "tool")  # templates paste the role between control marks
FOLLOWERS = {  # who may speak next in Mistral's format
    "system": ("system", "user", "assistant"),
    "user": ("system", "user", "assistant"),
    "assistant": ("user", "assistant", "tool"),
    "tool": ("user", "assistant", "tool"),
}
NEWEST_VERSION = 13


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    continue_answer: bool = False,
    generation_prompt: bool | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a chat, begin-of-sequence token included, ready for the model.

    messages: objects with `role` and `content`; content is a string or a list of `{"type": "text", "text": …}`. A
        response may hold `tool_calls` (`{"id": …, "function": {"name": …, "arguments": JSON or object}}`), which
        messages of role `tool` with that `tool_call_id` reply to. `"weight": 0` on a response keeps it out of the loss
        mask, and `train_detail` stretches of it.
    tools: what may be called: `{"type": "function", "function": {"name": …, "description": …, "parameters": …}}`.
    continue_answer: the last message is the beginning of a response and stays open, without its end token.
    generation_prompt: whether a template opens the next response; by default where the last message is not a response.
        Mistral's format needs no such opening.
    variables: more of them for a template, such as `enable_thinking`.
    Raises UserError on roles out of order, unknown roles, missing contents, and on what a template itself refuses.
    """
    check(messages)
    check_tools(tools)
    answered = messages[-1]["role"] == "assistant"
    if continue_answer and not answered:
        raise UserError(f"{place(len(messages) - 1)}: only an assistant message can be continued")
    if tokenizer.chat_template is None:
        parts = mistral_parts(tokenizer, messages, tools, continue_answer)
        return tokenizer.encode_parts(part for part, _ in parts)
    if generation_prompt is None:
        generation_prompt = not answered
    return tokenizer.encode_parts(
        template_parts(tokenizer, messages, tools, generation_prompt, continue_answer, variables)
    )


def encode_with_assistant_mask(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] | None = None
) -> tuple[list[int], list[bool]]:
    """Ids of a chat as `render_chat` gives them, and a mask of those that the assistant wrote; for training.

    Raises UserError as `render_chat` does, and where a template does not show which part of its text is a response.
    """
    check(messages)
    check_tool_list(tools)
    if tokenizer.chat_template is None:
        return tokenizer.encode_marked(mistral_parts(tokenizer, messages, tools))
    return tokenizer.encode_marked(spoken_template_parts(tokenizer, messages, tools))


def read_messages(path: str | Path) -> list[dict[str, Any]]:
    """Messages from a JSON file: a list of them, or an object with the key `messages`. Raises UserError."""
    return _read_checked(path, "messages", check)


def read_tools(path: str | Path) -> list[dict[str, Any]] | None:
    """The `tools` beside the `messages` of such a file; None where there are none. Raises UserError."""
    return _read_checked(path, "tools", check_tools)


def _read_checked(path: str | Path, key: str, check_value: Callable[[Any], None]) -> Any:
    value = read_json(Path(path), object)
    found = value.get(key) if isinstance(value, dict) else value if key == "messages" else None
    try:
        check_value(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return found


def mistral_parts(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    continue_answer: bool = False,
) -> list[MarkedPart]:
    """A chat in Mistral's format: texts and control ids, and a mask of those that the assistant wrote."""
    number = version_number(tokenizer)
    check_order(messages)
    check_calls(messages, number)
    if number < 13:  # later formats have no ids
        messages = nine_character_ids(messages)
    check_tools(tools)
    if tools and number < OLDEST_WITH_TOOLS:
        raise UserError(f"{tokenizer.path}: chat format v{number} has no tools; v{OLDEST_WITH_TOOLS} and newer have")
    turns = by_role(messages)
    texts = {at: text_of(message, at) for at, message in enumerate(messages)}
    system = BREAK.join(texts[at] for role, group in turns if role == "system" for at, _ in group if texts[at])
    if number < 7:
        turns = [turn for turn in turns if turn[0] != "system"]
        if not turns or turns[0][0] != "user":
            turns.insert(0, ("user", []))
    users = [at for at, (role, _) in enumerate(turns) if role == "user"]
    folded_into = None if number >= 7 or not system else users[0] if number == 1 else users[-1]
    tools_before = None if not tools or not users else users[0] if number >= 13 else users[-1]

    marked: list[MarkedPart] = [(tokenizer.control_id("<s>"), False)]
    call_ids: list[str] = []  # of the last response
    for turn, (role, group) in enumerate(turns):
        text = BREAK.join(texts[at] for at, _ in group if texts[at])
        parts: list[str | int] = []
        if role == "system":
            for at, _ in group:
                parts += [tokenizer.control_id("[SYSTEM_PROMPT]"), texts[at], tokenizer.control_id("[/SYSTEM_PROMPT]")]
        elif role == "user":
            question = system + BREAK + text if turn == folded_into else text
            parts += tool_parts(tokenizer, tools) if tools and turn == tools_before else []
            if number == 1:
                parts += [f"[INST] {question} [/INST]"]
            else:
                parts += [tokenizer.control_id("[INST]"), question, tokenizer.control_id("[/INST]")]
        elif role == "tool":
            if number >= 11:
                group = sorted(group, key=lambda item: call_ids.index(item[1]["tool_call_id"]))
            for at, message in group:
                parts += result_parts(tokenizer, number, message["tool_call_id"], texts[at])
        else:
            calls = [call for _, message in group for call in message.get("tool_calls") or []]
            call_ids = [call.get("id") for call in calls]
            if text and calls and number < 7:
                raise UserError(
                    f"{place(group[0][0])}: chat format v{number} has no response of both text and tool calls"
                )
            parts += [text if number == 1 else text.rstrip(" ")] if text else []
            parts += [*call_parts(tokenizer, number, calls), tokenizer.control_id("</s>")]
        learned = role == "assistant" and group[0][1].get("weight") != 0
        marked += marked_parts(parts, learned, [message for _, message in group])
    return marked[:-1] if continue_answer else marked


def version_number(tokenizer: Tokenizer) -> int:
    """The number of the tokenizer's chat format. Raises UserError where there is none, or none that is known here."""
    if tokenizer.version is None:
        raise UserError(f"{tokenizer.path}: no chat template beside it, and no control tokens [INST] and [/INST]")
    number = int(tokenizer.version[1:])
    if not 1 <= number <= NEWEST_VERSION:
        raise UserError(f"{tokenizer.path}: chat format v{number} is not known (v1 … v{NEWEST_VERSION})")
    return number


def by_role(messages: Sequence[Message]) -> list[tuple[str, list[tuple[int, Message]]]]:
    """Runs of neighboring messages of one role (and one weight), each message with its place."""
    grouped = groupby(enumerate(messages), key=lambda item: (item[1]["role"], item[1].get("weight")))
    return [(role, list(group)) for (role, _), group in grouped]


def text_of(message: Message, at: int) -> str:
    """The text of a message; text blocks join with a blank line. Raises UserError on anything that is no text."""
    content = message.get("content")
    if message["role"] == "assistant" and message.get("tool_calls") and content is None:
        return ""
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or any(
        not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str)
        for block in blocks
    ):
        raise UserError(f"{place(at)}.content: expected a text or a list of text blocks, got {content!r:.80}")
    text = BREAK.join(block["text"] for block in blocks if block["text"])
    if not text and message["role"] == "assistant" and not message.get("tool_calls"):
        raise UserError(f"{place(at)}: an assistant message without content")
    return text


def check(messages: Any) -> None:
    """Raises UserError unless these are messages: a list, not empty, of objects with a known role."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError("messages: expected a list of at least one object with role and content")
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"{place(at)}: expected an object with role and content, got {message!r:.80}")
        if message.get("role") not in ROLES:
            raise UserError(f"{place(at)}.role: expected one of {', '.join(ROLES)}, got {message.get('role')!r:.80}")


def check_order(messages: Sequence[Message]) -> None:
    """Raises UserError where roles follow one another as Mistral's format does not allow."""
    roles = [message["role"] for message in messages]
    for at, role in enumerate(roles):
        if role not in FOLLOWERS:
            raise UserError(f"{place(at)}.role: {role} is not supported in Mistral's format here")
        if at and role not in FOLLOWERS[roles[at - 1]]:
            allowed = ", ".join(FOLLOWERS[roles[at - 1]])
            raise UserError(f"{place(at)}.role: {role} cannot follow {roles[at - 1]} (could: {allowed})")
    if roles == ["assistant"]:
        raise UserError(f"{place(0)}: a chat starts with the role user or system")
