"""SentencePiece tokenizers from a `.model` file, on the sentencepiece library.

The library never reads a control token from text. Mistral's file names say which chat format belongs to the model
(`tokenizer.model.v3`, `….model.v7m1`); a plain `tokenizer.model` says nothing, and its control tokens decide: those of
`[SYSTEM_PROMPT]` mean v7, those of `[INST]` v3, none v1.
"""

import re
from collections.abc import Collection
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from nemoe_jax.errors import UserError
from nemoe_jax.text.tokenizers.base import Tokenizer, runs

SPACE = "▁"
VERSION = re.compile(r"\.model(?:\.(v\d+)(?:m\d+)?)?$")


def version_of(path: Path, control: Collection[str]) -> str:
    """The chat format of a SentencePiece model, by the name of its file and its control tokens."""
    named = VERSION.search(path.name)
    return (named and named[1]) or ("v7" if "[SYSTEM_PROMPT]" in control else "v3" if "[INST]" in control else "v1")


class SentencePiece(Tokenizer):
    """A tokenizer from a SentencePiece model."""

    kind = "sentencepiece"

    def __init__(self, path: Path):
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a SentencePiece model, or corrupted") from error
        self.path = path
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._optional(self._model.bos_id())
        self.eos_id = self._optional(self._model.eos_id())
        self.before = () if self.bos_id is None else (self.bos_id,)
        self.control = {self._model.id_to_piece(i): i for i in range(self.vocab_size) if self._model.is_control(i)}
        self.version = version_of(path, self.control)

    def _piece(self, token: int) -> str:
        return self._model.id_to_piece(token).replace(SPACE, " ")

    def _encode_text(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        if skip_special:
            return self._model.decode(ids)
        names = {i: name for name, i in self.control.items()}
        return "".join(
            "".join(names[i] for i in run) if is_control else self._model.decode(run)
            for is_control, run in runs(ids, set(names))
        )

    @staticmethod
    def _optional(token: int) -> int | None:
        return None if token < 0 else token
