"""Chats as token ids: Mistral's `[INST]…[/INST]` format, or the chat template of a Hugging Face directory.

    render_chat(tokenizer, [{"role": "system", "content": "You are …"}, {"role": "user", "content": "What …?"}])
    # <s>[INST]You are …\n\nWhat …?[/INST]

Mistral's format, as mistral-common encodes it (it is the reference; the tests compare ids): neighbouring messages of
one role join with a blank line; the system prompts, joined likewise, go before the *last* user message (`v2`, `v3`),
before the first (`v1`), or between control tokens of their own (`v7` on); each answer ends with `</s>`. Only these
functions make control ids: what a message spells out is encoded as text. (In `v1` the markers themselves are text.)
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from nemoe_jax.chat_template import template_parts
from nemoe_jax.errors import UserError
from nemoe_jax.tokenizer_base import Tokenizer, read_json

Message = Mapping[str, Any]
BREAK = "\n\n"
ROLES = ("system", "developer", "user", "assistant", "tool")  # templates paste the role between control marks
FOLLOWERS = {  # who may speak next in Mistral's format
    "system": ("system", "user", "assistant"),
    "user": ("system", "user", "assistant"),
    "assistant": ("user", "assistant"),
}
NEWEST_VERSION = 13


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    continue_answer: bool = False,
    generation_prompt: bool | None = None,
) -> list[int]:
    """Ids of a chat, begin-of-sequence token included, ready for the model.

    messages: objects with `role` and `content`; content is a text or a list of `{"type": "text", "text": …}`.
    continue_answer: the last message is the beginning of an answer and stays open, without its end token.
    generation_prompt: whether a template opens the next answer; by default where the last message is not an answer.
        Mistral's format needs no such opening.
    Raises UserError on roles out of order, unknown roles, missing contents, and on what a template itself refuses.
    """
    check(messages)
    answered = messages[-1]["role"] == "assistant"
    if continue_answer and not answered:
        raise UserError(f"{place(len(messages) - 1)}: only an answer (role assistant) can be continued")
    if tokenizer.chat_template is None:
        return tokenizer.encode_parts(mistral_parts(tokenizer, messages, continue_answer))
    if generation_prompt is None:
        generation_prompt = not answered
    return tokenizer.encode_parts(template_parts(tokenizer, messages, generation_prompt, continue_answer))


def read_messages(path: str | Path) -> list[dict[str, Any]]:
    """Messages from a JSON file: a list of them, or an object with the key `messages`. Raises UserError."""
    value = read_json(Path(path), object)
    messages: Any = value.get("messages") if isinstance(value, dict) else value
    try:
        check(messages)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return messages


def mistral_parts(tokenizer: Tokenizer, messages: Sequence[Message], continue_answer: bool) -> list[str | int]:
    """A chat in Mistral's format, as texts interleaved with control ids."""
    number = version_number(tokenizer)
    check_order(messages)
    turns = [(role, [text_of(message, at) for at, message in group]) for role, group in by_role(messages)]
    system = BREAK.join(text for role, texts in turns if role == "system" for text in texts if text)
    if number < 7:
        turns = [turn for turn in turns if turn[0] != "system"]
        if not turns or turns[0][0] != "user":
            turns.insert(0, ("user", [""]))
    users = [at for at, (role, _) in enumerate(turns) if role == "user"]
    folded_into = None if number >= 7 or not system else users[0] if number == 1 else users[-1]

    parts: list[str | int] = [tokenizer.control_id("<s>")]
    for at, (role, texts) in enumerate(turns):
        text = BREAK.join(filter(None, texts))
        if role == "system":
            for prompt in texts:
                parts += [tokenizer.control_id("[SYSTEM_PROMPT]"), prompt, tokenizer.control_id("[/SYSTEM_PROMPT]")]
        elif role == "user":
            question = system + BREAK + text if at == folded_into else text
            if number == 1:
                parts += [f"[INST] {question} [/INST]"]
            else:
                parts += [tokenizer.control_id("[INST]"), question, tokenizer.control_id("[/INST]")]
        else:
            parts += [text if number == 1 else text.rstrip(" "), tokenizer.control_id("</s>")]
    return parts[:-1] if continue_answer else parts


def version_number(tokenizer: Tokenizer) -> int:
    """The number of the tokenizer's chat format. Raises UserError where there is none, or none that is known here."""
    if tokenizer.version is None:
        raise UserError(f"{tokenizer.path}: no chat template beside it, and no control tokens [INST] and [/INST]")
    number = int(tokenizer.version[1:])
    if not 1 <= number <= NEWEST_VERSION:
        raise UserError(f"{tokenizer.path}: chat format v{number} is not known (v1 … v{NEWEST_VERSION})")
    return number


def by_role(messages: Sequence[Message]) -> list[tuple[str, list[tuple[int, Message]]]]:
    """Runs of neighbouring messages of one role, each message with its place."""
    grouped = groupby(enumerate(messages), key=lambda item: item[1]["role"])
    return [(role, list(group)) for role, group in grouped]


def text_of(message: Message, at: int) -> str:
    """The text of a message; text blocks join with a blank line. Raises UserError on anything that is no text."""
    content = message.get("content")
    if message.get("tool_calls"):
        raise UserError(f"{place(at)}: tool calls are not supported in Mistral's format here")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or any(
        not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str)
        for block in blocks
    ):
        raise UserError(f"{place(at)}: content: wanted a text or a list of text blocks, got {content!r:.80}")
    text = BREAK.join(block["text"] for block in blocks if block["text"])
    if not text and message["role"] == "assistant":
        raise UserError(f"{place(at)}: an answer (role assistant) without content")
    return text


def check(messages: Any) -> None:
    """Raises UserError unless these are messages: a list, not empty, of objects with a known role."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError("messages: wanted a list of at least one object with role and content")
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"{place(at)}: wanted an object with role and content, got {message!r:.80}")
        if message.get("role") not in ROLES:
            raise UserError(f"{place(at)}: role: wanted one of {', '.join(ROLES)}, got {message.get('role')!r:.80}")


def check_order(messages: Sequence[Message]) -> None:
    """Raises UserError where roles follow one another as Mistral's format does not allow."""
    roles = [message["role"] for message in messages]
    for at, role in enumerate(roles):
        if role not in FOLLOWERS:
            raise UserError(f"{place(at)}: role {role} is not supported in Mistral's format here")
        if at and role not in FOLLOWERS[roles[at - 1]]:
            allowed = ", ".join(FOLLOWERS[roles[at - 1]])
            raise UserError(f"{place(at)}: role {role} cannot follow {roles[at - 1]} (could: {allowed})")
    if roles == ["assistant"]:
        raise UserError(f"{place(0)}: a chat starts with the role user or system")


def place(at: int) -> str:
    """How an error names a message."""
    return f"messages[{at}]"
