"""The loop of a chat: lines that begin with a slash are commands, others are messages."""

from nemoe_jax.errors import UserError
from nemoe_jax.serving.terminal import slash_commands
from nemoe_jax.serving.terminal.session import Session
from nemoe_jax.serving.terminal.terminal import PipeIO


def run(session: Session, terminal: PipeIO) -> None:
    """Reads messages and commands to their end.

    Raises:
        UserError: the first error, where the terminal is not interactive.
    """
    session.terminal = terminal
    for text in terminal.messages():
        try:
            if text.startswith("/") and not text.startswith("//"):
                slash_commands.run(session, text)
            else:
                session.ask(text.removeprefix("/") if text.startswith("//") else text)
        except slash_commands.Quit:
            return
        except UserError as error:
            if not terminal.interactive:
                raise
            terminal.note(f"error: {error}", "red")
