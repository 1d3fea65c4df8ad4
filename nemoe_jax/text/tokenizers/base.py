"""What every tokenizer can do, whatever file it came from.

Text and control tokens never mix: `encode` reads everything in a string as text, so that a user who types `[INST]` or
`</s>` gets the characters; control ids enter only as integers, through `encode_parts` (which the chat formats use),
through the `bos` and `eos` flags, or because the tokenizer itself puts them around a text.

Whether a text begins with the begin-of-sequence token is the tokenizer's own rule, kept in `before` and `after` and
followed by whatever gives plain text to a model: `encode_prompt` for generation, scoring and the API,
`encode_document` for training, calibration and perplexity.

    tekken.json                        BOS before a text, as mistral-common does
    tokenizer.json                     what its post-processor adds, as transformers does
    tokenizer.model                    BOS before a text; beside a tokenizer_config.json, what its `add_bos_token` and
                                       `add_eos_token` say (nothing where they are missing), as transformers does
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from nemoe_jax.errors import UserError

LEARNED, LEFT_OUT = 1, 2  # marks of a character
# a string or a control id, and a mark that its ids take over: one for all of it, or one for each character
MarkedPart = tuple[str | int, bool | bytes]
TOOL_USE = "tool_use"  # the name of the chat template for chats with tools


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        path: the file that it came from.
        kind: `tekken`, `sentencepiece` or `tokenizer.json`.
        vocab_size: ids are 0 … vocab_size − 1, control tokens included.
        gaps: those of them that no token has.
        bos_id, eos_id: None where the tokenizer has none.
        before, after: ids that the tokenizer puts around a text.
        control: ids of the control tokens by name (`</s>`, `[INST]`, …).
        version: Mistral's chat format (`v1`, `v3`, `v7`, …), None where it is not known.
        chat_templates: Hugging Face chat templates by name: mostly `default` alone, or `tool_use` beside it.
        template_variables: the names that a template may use (`bos_token`, …).
    """

    kind: str
    path: Path
    vocab_size: int
    gaps: Collection[int] = ()
    bos_id: int | None
    eos_id: int | None
    control: Mapping[str, int]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    version: str | None = None
    chat_templates: Mapping[str, str] = {}
    template_variables: Mapping[str, str] = {}

    @property
    def chat_template(self) -> str | None:
        """The default chat template, or another one where there is no default; None where there is none at all."""
        return self.chat_templates.get("default") or next(iter(self.chat_templates.values()), None)

    def template_for(self, tools: bool) -> str | None:
        """The template of a chat: with tools the one named `tool_use`, if there is one, and otherwise the default.

        Raises:
            UserError: there are templates, but none for such a chat.
        """
        if tools and TOOL_USE in self.chat_templates:
            return self.chat_templates[TOOL_USE]
        if self.chat_templates and "default" not in self.chat_templates:
            names = ", ".join(sorted(self.chat_templates))
            raise UserError(f"{self.path}: chat template: expected one named default, got {names}")
        return self.chat_templates.get("default")

    @property
    def files(self) -> list[Path]:
        """The files that the tokenizer was read from, for keys of caches."""
        return [self.path]

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a string, all of it read as text; `bos` and `eos` add those ids where the tokenizer has them."""
        start = [self.bos_id] if bos and self.bos_id is not None else []
        end = [self.eos_id] if eos and self.eos_id is not None else []
        return [*start, *self._encode_text(replace_surrogates(text)), *end]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued or scored, between what the tokenizer itself puts around a text."""
        return [*self.before, *self.encode(text), *self.after]

    def encode_document(self, text: str) -> list[int]:
        """Ids of a text to be learned or measured: as `encode_prompt`, and closed by the end-of-sequence token."""
        return self.closed(self.encode_prompt(text))

    def closed(self, ids: list[int]) -> list[int]:
        """The ids with the end-of-sequence token behind them, where the tokenizer has one and it is not there yet."""
        return ids if self.eos_id is None or ids[-1:] == [self.eos_id] else [*ids, self.eos_id]

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of strings interleaved with control ids; each string is encoded apart from its neighbors."""
        return [i for part in parts for i in (self.encode(part) if isinstance(part, str) else [part])]

    def encode_marked(self, parts: Iterable[MarkedPart]) -> tuple[list[int], list[bool]]:
        """Ids as `encode_parts` gives them, and of each the mark of the part that it came from."""
        ids: list[int] = []
        marks: list[bool] = []
        for part, mark in parts:
            own = self.encode_parts([part])
            ends = [len(self.decode(own[: n + 1])) for n in range(len(own))] if isinstance(mark, bytes) else []
            for n in range(len(own)):
                marks.append(mark if isinstance(mark, bool) else is_learned(mark, ends[n - 1] if n else 0, ends[n]))
            ids += own
        return ids, marks

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
        """Text of ids; control tokens are left out, or written by name. Bytes that are not UTF-8 become U+FFFD.

        Ids beyond the vocabulary, as the rows have that pad an embedding, stand for nothing (as in transformers).
        """
        return self._decode([i for i in self._check(ids) if i < self.vocab_size], skip_special)

    def known(self, rows: int) -> np.ndarray | None:
        """Which rows of an embedding stand for a token, bool (rows,); None where all do."""
        known_V = np.arange(rows) < self.vocab_size
        known_V[[i for i in self.gaps if i < rows]] = False
        return None if known_V.all() else known_V

    def piece(self, token: int) -> str:
        """One id in readable form: text, a control token's name, or `<0xE2><0x82>` for a fragment of a character.

        Empty for an id beyond the vocabulary.
        """
        return self._piece(token) if self._check([token])[0] < self.vocab_size else ""

    def control_id(self, name: str) -> int:
        """Id of a control token by name.

        Raises:
            UserError: the tokenizer has none of that name.
        """
        if name not in self.control:
            raise UserError(f"{self.path}: no control token {name}")
        return self.control[name]

    @abstractmethod
    def _piece(self, token: int) -> str: ...

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int], skip_special: bool) -> str: ...

    def _check(self, ids: Iterable[SupportsIndex]) -> list[int]:
        checked = [i.__index__() for i in ids]
        wrong = next((i for i in checked if i < 0), None)
        if wrong is not None:
            raise UserError(f"token id {wrong} is outside the vocabulary of {self.path} (0 … {self.vocab_size - 1})")
        return checked


def runs(ids: Sequence[int], control: set[int]) -> Iterable[tuple[bool, list[int]]]:
    """Splits ids into runs of control tokens (True) and of text (False)."""
    return ((is_control, list(run)) for is_control, run in groupby(ids, control.__contains__))


def is_learned(marks: bytes, start: int, end: int) -> bool:
    """Whether a token of the characters start … end is to be learned: one of them is, and none is left out."""
    own = marks[start : max(end, start + 1)]
    return LEARNED in own and LEFT_OUT not in own


def replace_surrogates(text: str) -> str:
    """Joins surrogate pairs and replaces lone surrogates, which no UTF-8 text can hold, by U+FFFD, as tiktoken does."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_from_bytes(data: bytes) -> str:
    """Text of a file's bytes: line ends kept, each invalid UTF-8 sequence read as one U+FFFD."""
    return data.decode("utf-8", "replace")
