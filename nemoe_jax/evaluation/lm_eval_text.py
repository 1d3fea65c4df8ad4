"""Text as tokens the way the harness's own Hugging Face model makes them, so that scores can be compared.

The harness pastes a benchmark's prompt, chats included, into one text. transformers adds to it what a `tokenizer.json`
has in its post-processor (mostly the begin-of-sequence token), and reads control tokens that the text spells out as
such; of a Tekken file it reads all text as text behind the begin-of-sequence token. So do we, but that control tokens
of Mistral's chat format are read as such once a chat was asked for: as text they would be no chat.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemoe_jax.errors import UserError
from nemoe_jax.text.chat.render import check, mistral_parts
from nemoe_jax.text.chat.template import template_parts
from nemoe_jax.text.tokenizers.hf_tokenizer import TokenizerJson
from nemoe_jax.text.tokenizers.load import Tokenizer


class HarnessText:
    """Encodes a harness's texts, and writes chats as one."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.reads_control = isinstance(tokenizer, TokenizerJson)
        names = sorted(filter(None, tokenizer.control), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, names)) or "(?!)")  # which matches nothing

    @property
    def prefix_id(self) -> int:
        """What stands before a text that has no context."""
        for token in (self.tokenizer.bos_id, self.tokenizer.eos_id):
            if token is not None:
                return token
        raise UserError(f"{self.tokenizer.path}: expected a begin- or end-of-sequence token, to score texts from")

    def encode(self, text: str, surrounded: bool | None = None) -> list[int]:
        """Ids; `surrounded` by what the tokenizer puts around a text, by default unless its beginning is there."""
        if surrounded is None:
            surrounded = not text.startswith(self.tokenizer.decode([self.prefix_id], skip_special=False))
        ids = self.tokenizer.encode_parts(self._parts(text)) if self.reads_control else self.tokenizer.encode(text)
        return [*self.tokenizer.before, *ids, *self.tokenizer.after] if surrounded else ids

    def _parts(self, text: str) -> list[str | int]:
        parts: list[str | int] = []
        at = 0
        for match in self._spelled.finditer(text):
            parts += [text[at : match.start()], self.tokenizer.control[match[0]]]
            at = match.end()
        return [part for part in [*parts, text[at:]] if part != ""]

    def chat(self, messages: Sequence[Mapping[str, Any]], answer_follows: bool) -> str:
        """A chat as text that ends where the answer begins, or in the middle of its last answer.

        A template that refuses the system's message gets the chat without it, as the harness does.
        """
        self.reads_control = True
        check(messages)
        try:
            return self._chat(messages, answer_follows)
        except UserError:
            rest = [message for message in messages if message["role"] != "system"]
            if len(rest) == len(messages):
                raise
            return self._chat(rest, answer_follows)

    def _chat(self, messages: Sequence[Mapping[str, Any]], answer_follows: bool) -> str:
        parts: Sequence[str | int]
        if self.tokenizer.chat_template is None:
            marked = mistral_parts(self.tokenizer, messages, continue_answer=not answer_follows)
            parts = [part for part, _ in marked]
        else:
            parts = template_parts(self.tokenizer, messages, None, answer_follows, not answer_follows)
        return "".join(part if isinstance(part, str) else self.tokenizer.piece(part) for part in parts)
