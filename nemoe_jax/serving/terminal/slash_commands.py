"""What a chat does on lines that begin with a slash."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.table import Table

from nemoe_jax.errors import UserError
from nemoe_jax.inference import sampling_fields
from nemoe_jax.inference.sampling import PRESETS

if TYPE_CHECKING:
    from nemoe_jax.serving.terminal.session import Session

NOTES = """
Enter sends a message. It has several lines where one ends in a backslash, between two \"\"\", or by Alt-Enter.
Ctrl-C stops an answer. A message that begins with a slash itself: double it.
"""


class Quit(Exception):
    """The chat is to end."""


class ChatCommand(NamedTuple):
    """A line that begins with a slash."""

    argument: str
    help: str
    run: "Callable[[Session, str], None]"


def run(session: "Session", line: str) -> None:
    """Does what a line says. Raises UserError on what makes no sense, and Quit."""
    name, _, argument = line.removeprefix("/").partition(" ")
    if name not in COMMANDS:
        raise UserError(f"/{name}: no such command; /help shows them")
    COMMANDS[name].run(session, argument.strip())


def _help(session: "Session", _: str) -> None:
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(f"/{name} {command.argument}", command.help)
    session.terminal.note(table, "default")
    session.terminal.note(NOTES, "default")


def _system(session: "Session", text: str) -> None:
    if text:
        session.conversation.system = "" if text in ('""', "''") else text
    session.terminal.note(f"system prompt: {session.conversation.system or 'none'}")


def _preset(session: "Session", name: str) -> None:
    if name:
        sampling = dataclasses.replace(sampling_fields.preset(name), seed=session.template.sampling.seed)
        session.template = dataclasses.replace(session.template, sampling=sampling)
        session.preset = name
    session.terminal.note(f"preset: {session.preset or 'none'} (of {', '.join(PRESETS)})")


def _set(session: "Session", setting: str) -> None:
    name, value = [*re.split(r"[\s=]+", setting, maxsplit=1), ""][:2]
    template = session.template
    if name == "max_new_tokens":
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"max_new_tokens: expected a positive number, got {value!r:.80}")
        session.template = dataclasses.replace(template, max_new_tokens=int(value))
    elif name:
        sampling = sampling_fields.from_text(template.sampling, name, value)
        sampling.check(session.engine.config.vocab)
        session.template = dataclasses.replace(template, sampling=sampling)
    values = sampling_fields.as_fields(session.template.sampling) | {"max_new_tokens": session.template.max_new_tokens}
    chosen = [name] if name else list(values)
    session.terminal.note("\n".join(f"{name} {values[name]}" for name in chosen))


def _regenerate(session: "Session", _: str) -> None:
    before = list(session.conversation.messages)
    if not session.conversation.reopen():
        raise UserError("/regenerate: there is no question yet")
    if session.template.sampling.temperature == 0:
        session.terminal.note("at temperature 0 an answer is always the same; /set temperature 0.7")
    session.answer(before)


def _undo(session: "Session", _: str) -> None:
    question = session.conversation.undo()
    if not question:
        raise UserError("/undo: there is no question yet")
    session.terminal.note(f"forgotten: {question}")


def _clear(session: "Session", _: str) -> None:
    session.conversation.clear()
    session.terminal.note("forgotten: all but the system prompt")


def _tokens(session: "Session", _: str) -> None:
    conversation = session.conversation
    if not conversation.messages:
        session.terminal.note(f"0 of {conversation.context} tokens")
        return
    prompt = conversation.prompt(session.room())
    left_out = f"; the oldest turns, {prompt.left_out}, are left out" if prompt.left_out else ""
    session.terminal.note(
        f"{len(prompt.tokens)} of {conversation.context} tokens, {session.room()} kept free for an answer{left_out}"
    )


def _save(session: "Session", file: str) -> None:
    session.conversation.save(_path("save", file))
    session.terminal.note(f"{file}: {len(session.conversation.messages)} messages")


def _load(session: "Session", file: str) -> None:
    session.conversation.load(_path("load", file))
    session.terminal.note(f"{file}: {len(session.conversation.messages)} messages")


def _path(name: str, file: str) -> Path:
    if not file:
        raise UserError(f"/{name}: expected a file, such as /{name} chat.json")
    return Path(file).expanduser()


def _quit(session: "Session", _: str) -> None:
    raise Quit


COMMANDS = {
    "help": ChatCommand("", "show this", _help),
    "system": ChatCommand("TEXT", 'set the system prompt ("" removes it); without TEXT, show it', _system),
    "preset": ChatCommand("NAME", f"sample as a preset says: {', '.join(PRESETS)}", _preset),
    "set": ChatCommand("NAME VALUE", "change a setting, such as temperature 0.7; without NAME, show them all", _set),
    "regenerate": ChatCommand("", "answer the last question anew", _regenerate),
    "undo": ChatCommand("", "forget the last question and its answer", _undo),
    "clear": ChatCommand("", "forget all but the system prompt", _clear),
    "tokens": ChatCommand("", "show how much of the context is taken", _tokens),
    "save": ChatCommand("FILE.json", "write the messages, for /load and for nemoe generate --chat", _save),
    "load": ChatCommand("FILE.json", "go on with the messages of a file", _load),
    "quit": ChatCommand("", "end the chat (so does Ctrl-D)", _quit),
}
