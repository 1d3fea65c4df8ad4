"""A chat between a person and a model: its messages, what of them fits into the context, its file."""

import bisect
import json
from pathlib import Path
from typing import Any, NamedTuple

from nemoe_jax.errors import UserError
from nemoe_jax.text.chat import render
from nemoe_jax.text.tokenizers.base import Tokenizer
from nemoe_jax.utils.output_path import atomic_write

SYSTEM = ("system", "developer")


class Prompt(NamedTuple):
    """What the model reads before its next answer."""

    tokens: tuple[int, ...]
    left_out: int  # of the oldest turns, for want of room


class Conversation:
    """The messages so far; a turn is a question with all that came of it.

    messages: as `nemoe generate --chat` reads them, a system message first, if any.
    tools: that a file brought along; None where there are none.
    """

    def __init__(self, tokenizer: Tokenizer, context: int):
        self.tokenizer = tokenizer
        self.context = context
        self.messages: list[dict[str, Any]] = []
        self.tools: list[dict[str, Any]] | None = None

    @property
    def system(self) -> str:
        """The system prompt; empty where there is none."""
        return render.BREAK.join(render.text_of(m, at) for at, m in enumerate(self.messages) if m["role"] in SYSTEM)

    @system.setter
    def system(self, text: str) -> None:
        system = [{"role": "system", "content": text}] if text else []
        self.messages = system + [message for message in self.messages if message["role"] not in SYSTEM]

    def ask(self, text: str) -> None:
        """Adds a question."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Adds the answer to the last question."""
        self.messages.append({"role": "assistant", "content": text})

    def clear(self) -> None:
        """Forgets all but the system prompt."""
        self.messages = [message for message in self.messages if message["role"] in SYSTEM]

    def reopen(self) -> bool:
        """Forgets what came of the last question, but not the question; False where there is none."""
        users = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        del self.messages[users[-1] + 1 if users else len(self.messages) :]
        return bool(users)

    def undo(self) -> str:
        """Forgets the last turn; returns its question, empty where there is no turn."""
        users = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            return ""
        question = render.text_of(self.messages[users[-1]], users[-1])
        del self.messages[users[-1] :]
        return question

    def prompt(self, room: int) -> Prompt:
        """The ids of the chat, without as many of the oldest turns as it takes to leave `room` tokens for the answer.

        Raises:
            UserError: roles that the chat format does not allow, or a last turn too long for the context.
        """
        system = [message for message in self.messages if message["role"] in SYSTEM]
        turns = [message for message in self.messages if message["role"] not in SYSTEM]
        starts = [at for at, message in enumerate(turns) if message["role"] == "user"] or [0]

        def tokens_without(left_out: int) -> list[int]:
            start = starts[left_out] if left_out else 0
            return render.render_chat(self.tokenizer, system + turns[start:], tools=self.tools)

        def fits(left_out: int) -> bool:
            return len(tokens_without(left_out)) + room <= self.context

        left_out = bisect.bisect_left(range(len(starts)), True, key=fits)
        tokens = tokens_without(min(left_out, len(starts) - 1))
        if left_out == len(starts):
            raise UserError(
                f"the last message{', with the system prompt,' if system else ''} takes {len(tokens)} tokens: expected "
                f"{room} more for the answer, and the context is of {self.context}"
            )
        return Prompt(tuple(tokens), left_out)

    def save(self, path: Path) -> None:
        """Writes the messages (with the tools, if any), whole or not at all. Raises UserError.

        A file that is there already is replaced only if it holds messages.
        """
        value = {"messages": self.messages, "tools": self.tools} if self.tools else self.messages
        if path.exists():
            try:
                render.read_messages(path)
            except UserError as error:
                raise UserError(f"{path}: exists already, and holds no messages: not replaced") from error
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Takes over the messages of a file. Raises UserError where they are none for this model."""
        messages, tools = render.read_messages(path), render.read_tools(path)
        try:
            render.render_chat(self.tokenizer, messages, tools=tools)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        self.messages, self.tools = messages, tools
