"""What every tokenizer can do, whatever file it came from, and how its output is streamed.

Text and control tokens never mix: `encode` reads everything in a text as text, so that a user who types `[INST]` or
`</s>` gets the characters; control ids enter only as integers, through `encode_parts` (which the chat formats use) or
through the `bos` and `eos` flags.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import SupportsIndex

from nemoe_jax.errors import UserError

MarkedPart = tuple[str | int, bool]  # a text or a control id, and a mark that its ids take over


class Tokenizer(ABC):
    """Text to ids and back.

    path: the file that it came from; kind: `tekken`, `sentencepiece` or `tokenizer.json`.
    vocab_size: ids are 0 … vocab_size − 1, control tokens included.
    bos_id, eos_id: None where the tokenizer has none.
    control: ids of the control tokens by name (`</s>`, `[INST]`, …).
    version: Mistral's chat format (`v1`, `v3`, `v7`, …), None where it is not known.
    chat_template, template_variables: a Hugging Face chat template and the names that it may use (`bos_token`, …).
    """

    kind: str
    path: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    control: Mapping[str, int]
    version: str | None = None
    chat_template: str | None = None
    template_variables: Mapping[str, str] = {}

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text, all of it read as text; `bos` and `eos` add those ids where the tokenizer has them."""
        start = [self.bos_id] if bos and self.bos_id is not None else []
        end = [self.eos_id] if eos and self.eos_id is not None else []
        return [*start, *self._encode_text(mend_surrogates(text)), *end]

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of texts interleaved with control ids; each text is encoded apart from its neighbors."""
        return [i for part in parts for i in (self.encode(part) if isinstance(part, str) else [part])]

    def encode_marked(self, parts: Iterable[MarkedPart]) -> tuple[list[int], list[bool]]:
        """Ids as `encode_parts` gives them, and of each the mark of the part that it came from."""
        encoded = [(self.encode_parts([part]), mark) for part, mark in parts]
        return [i for ids, _ in encoded for i in ids], [mark for ids, mark in encoded for _ in ids]

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
        """Text of ids; control tokens are left out, or written by name. Bytes that are no UTF-8 become U+FFFD."""
        return self._decode(self._check(ids), skip_special)

    def control_id(self, name: str) -> int:
        """Id of a control token by name. Raises UserError where the tokenizer has none of that name."""
        if name not in self.control:
            raise UserError(f"{self.path}: no control token {name}")
        return self.control[name]

    @abstractmethod
    def piece(self, token: int) -> str:
        """One id in readable form: text, a control token's name, or `<0xE2><0x82>` for a fragment of a character."""

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int], skip_special: bool) -> str: ...

    def _check(self, ids: Iterable[SupportsIndex]) -> list[int]:
        checked = [i.__index__() for i in ids]
        wrong = next((i for i in checked if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise UserError(f"token id {wrong} is outside the vocabulary of {self.path} (0 … {self.vocab_size - 1})")
        return checked


def runs(ids: Sequence[int], control: set[int]) -> Iterable[tuple[bool, list[int]]]:
    """Splits ids into runs of control tokens (True) and of text (False)."""
    return ((is_control, list(run)) for is_control, run in groupby(ids, control.__contains__))


def mend_surrogates(text: str) -> str:
    """Joins surrogate pairs and replaces lone surrogates, which no UTF-8 text can hold, by U+FFFD, as tiktoken does."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_from_bytes(data: bytes) -> str:
    """Text of a file's bytes: line ends kept, each invalid UTF-8 sequence read as one U+FFFD."""
    return data.decode("utf-8", "replace")
