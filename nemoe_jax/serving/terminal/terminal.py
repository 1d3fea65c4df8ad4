"""Where a chat happens: a terminal with an input line and its history, or a pipe with a message on each line.

Answers go to standard output, all else to standard error, so that the answers of a pipe can be kept.

A message of several lines: lines that end in a backslash go on, and so does all between two \"\"\". In a terminal,
Alt-Enter (Escape, then Enter) begins a new line as well.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from nemoe_jax.serving.engine.completion import shown

FENCE = '"""'


def is_whole(text: str) -> bool:
    """Whether a message is at its end, as far as backslashes and fences tell."""
    stripped = text.strip()
    if stripped.startswith(FENCE):
        return len(stripped) >= 2 * len(FENCE) and stripped.endswith(FENCE)
    return not text.endswith("\\")


def message_of(text: str) -> str:
    """A message as it was meant: without its fences, and without the backslashes at the ends of its lines."""
    stripped = text.strip()
    if stripped.startswith(FENCE):
        return stripped.removeprefix(FENCE).removesuffix(FENCE).strip("\n")
    return "\n".join(line.removesuffix("\\") for line in stripped.split("\n")).strip()


def history_file() -> Path:
    """Where the lines that were typed are kept: under the user's state directory, as XDG says."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "nemoe" / "chat_history"


class PipeIO:
    """A chat without a terminal."""

    interactive = False

    def __init__(self):
        self._notes = Console(stderr=True, highlight=False, soft_wrap=not self.interactive)

    def messages(self) -> Iterator[str]:
        """What is said, message by message."""
        text = ""
        for line in sys.stdin:
            text += line.removesuffix("\n")
            if not is_whole(text):
                text += "\n"
            elif text.strip():
                yield message_of(text)
                text = ""
            else:
                text = ""
        if text.strip():
            yield message_of(text)

    def answer(self, text: str) -> None:
        """Shows a part of an answer."""
        shown(text)

    def answered(self) -> None:
        """Ends an answer's line."""
        print(flush=True)

    def note(self, what: RenderableType, style: str = "dim") -> None:
        """Says something that is no answer."""
        self._notes.print(what, style=style, markup=False)

    def waiting(self) -> AbstractContextManager[Any]:
        """Shows that an answer is awaited."""
        return self._notes.status("reading")  # nothing where standard error is no terminal


class TerminalIO(PipeIO):
    """A chat in a terminal, by prompt_toolkit.

    commands: what Tab completes.
    status: the line below the input.
    """

    interactive = True

    def __init__(self, commands: Sequence[str], status: Callable[[], str]):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.formatted_text import FormattedText

        super().__init__()
        self._session: PromptSession[str] = PromptSession(
            FormattedText([("bold ansigreen", "> ")]),
            multiline=True,
            prompt_continuation="… ",
            key_bindings=_keys(),
            history=_history(),
            auto_suggest=AutoSuggestFromHistory(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            bottom_toolbar=lambda: f" {status()}",
        )

    def messages(self) -> Iterator[str]:
        """What is said, until Ctrl-D; Ctrl-C begins the line anew."""
        # a Ctrl-C that comes too late for an answer, or too early for the input line, does nothing
        before = signal.signal(signal.SIGINT, lambda number, frame: None)
        try:
            while True:
                try:
                    text = self._session.prompt()
                except KeyboardInterrupt:
                    self.note("(Ctrl-D or /quit ends the chat)")
                    continue
                except EOFError:
                    return
                if text.strip():
                    yield message_of(text)
        finally:
            signal.signal(signal.SIGINT, before)


def _history() -> Any:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_file()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:  # no place of his own: nothing is kept
        return InMemoryHistory()
    return FileHistory(path)


def _keys() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if is_whole(buffer.text):
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys
