"""A chat as it goes: messages are answered. Ctrl-C stops a response: what came of it stays."""

import contextlib
import dataclasses
import signal
from collections.abc import Generator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from nemoe_jax.errors import UserError
from nemoe_jax.serving.engine.completion import Completion, collect
from nemoe_jax.serving.engine.request import Request, RequestOutput
from nemoe_jax.serving.request_builder import RequestBuilder
from nemoe_jax.serving.terminal.conversation import Conversation
from nemoe_jax.serving.terminal.terminal import PipeIO

if TYPE_CHECKING:
    from nemoe_jax.serving.engine.engine import Engine


class Session:
    """One chat with one model.

    template: what each request asks for; its prompt is not used. Its seed is that of the first answer, and each further
        answer takes the next one, so that an answer made anew is another.
    preset: the name of the preset that the sampling parameters come from.
    """

    def __init__(
        self,
        conversation: Conversation,
        engine: "Engine",
        builder: RequestBuilder,
        template: Request,
        preset: str | None = None,
    ):
        self.conversation = conversation
        self.engine = engine
        self.builder = builder
        self.template = template
        self.preset = preset
        self.terminal = PipeIO()
        self._answers = 0
        self._left_out = 0

    def status(self) -> str:
        """Where the chat is, in one line."""
        preset = f"{self.preset} · " if self.preset else ""
        return f"{preset}temperature {self.template.sampling.temperature:g} · /help"

    def ask(self, text: str) -> None:
        """Adds a question, and has it answered. Raises UserError."""
        before = list(self.conversation.messages)
        self.conversation.ask(text)
        self.answer(before)

    def answer(self, otherwise: list[dict[str, Any]]) -> None:
        """Has the last question answered. Raises UserError; the messages are `otherwise` then, or if nothing came."""
        try:
            answer = self._made()
        except UserError:
            self.conversation.messages = otherwise
            raise
        nothing = not answer.text.strip()
        if nothing:
            self.conversation.messages = otherwise
        else:
            self.conversation.answer(answer.text)
        notes = [
            f"{len(answer.tokens)} tokens in {answer.seconds:.1f} s",
            f"{answer.rate:.1f} tokens/s" if answer.rate is not None else "",
            "stopped" if answer.finish_reason == "cancelled" else "",
            "cut off there: /set max_new_tokens for more" if answer.finish_reason == "length" else "",
            "no answer: the question is forgotten" if nothing else "",
        ]
        self.terminal.note(", ".join(filter(None, notes)))

    def room(self) -> int:
        """Tokens that are kept free for an answer: what it may take, or a quarter of the context if that is less."""
        return max(1, min(self.template.max_new_tokens, self.conversation.context // 4))

    def _made(self) -> Completion:
        prompt = self.conversation.prompt(self.room())
        if prompt.left_out > self._left_out:
            turns = "turn" if prompt.left_out == 1 else f"{prompt.left_out} turns"
            self.terminal.note(f"the context is full: the model no longer sees the oldest {turns}", "yellow")
        self._left_out = prompt.left_out
        sampling = self.template.sampling
        template = dataclasses.replace(
            self.template,
            max_new_tokens=min(self.template.max_new_tokens, self.conversation.context - len(prompt.tokens)),
            sampling=dataclasses.replace(sampling, seed=sampling.seed + self._answers),
        )
        self._answers += 1
        request = self.builder.of_tokens(template, prompt.tokens)
        with contextlib.closing(self._pieces(request)) as pieces:
            answer = collect(pieces, self.builder.end_tokens, self.terminal.answer)
        if answer.finish_reason == "cancelled" or (answer.text and not answer.text.endswith("\n")):
            self.terminal.answered()  # Ctrl-C shows as ^C
        return answer

    def _pieces(self, request: Request) -> Generator[RequestOutput, None, None]:
        """The pieces of an answer, which Ctrl-C cancels."""
        # The handler may interrupt this thread anywhere, in the engine's locks as well; a SimpleQueue bears that.
        queue: SimpleQueue[RequestOutput | None] = SimpleQueue()
        before = signal.signal(signal.SIGINT, lambda number, frame: queue.put(None))
        try:
            with self.terminal.waiting():
                answer = self.engine.submit(request, queue.put)
                piece = queue.get()
            while piece is None or piece.finish_reason is None:
                if piece is None:
                    answer.cancel()
                else:
                    yield piece
                piece = queue.get()
            yield piece
        finally:
            signal.signal(signal.SIGINT, before)
