"""A SentencePiece BPE that was rewritten as tokenizer.json, as the vocabulary by scores that llama.cpp has for it.

transformers writes such a file for Llama 2, Mistral and Mixtral: every pair of tokens whose string is a token is a
merge, in the order of that token's score. So the place of a token's first merge gives its score back. A BPE that lists
fewer pairs than that is another kind of tokenizer, and is refused.

Where a string begins with a space, SentencePiece and llama.cpp put another one before it. So does a tokenizer.json with
the normalizer `Prepend`; one with `Metaspace` does not, and then such strings begin with another token in llama.cpp.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gguf import TokenType

from nemoe_jax.errors import UserError

_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Piece(NamedTuple):
    """A token as llama.cpp spells it; the score matters to `llama` alone."""

    text: str
    type: int
    score: float = 0.0


def rewritten_pieces(path: Path, spec: dict[str, Any], merges: Sequence[tuple[str, ...]]) -> dict[int, Piece]:
    """The tokens of `spec`, the content of a tokenizer.json, without those that were added.

    Raises:
        UserError: it is no SentencePiece BPE.
    """
    model = spec["model"]
    if model.get("type", "BPE") != "BPE" or not model.get("byte_fallback") or _space_rules(spec) is None:
        raise UserError(
            f"{path}: gguf expects a byte-level BPE without normalizer, or SentencePiece's BPE with byte fallback"
        )
    vocab, unknown = model["vocab"], model.get("unk_token")
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, float(-rank))
    listed = set(merges)
    added = {token["content"] for token in spec.get("added_tokens") or []}
    pieces = {}
    for text, i in vocab.items():
        kind = TokenType.NORMAL
        if text == unknown:
            kind = TokenType.UNKNOWN
        elif _BYTE.fullmatch(text):
            kind = TokenType.BYTE
        elif text not in added:
            pairs = ((text[:at], text[at:]) for at in range(1, len(text)))
            if lost := next((pair for pair in pairs if vocab.keys() >= {*pair} and pair not in listed), None):
                left, right = lost
                raise UserError(
                    f"{path}: not SentencePiece's BPE: {left!r} and {right!r} are tokens and make one, but no merge"
                )
        pieces[i] = Piece(text, kind, scores.get(text, 0.0))
    return pieces


def has_space_prefix(spec: dict[str, Any]) -> bool:
    """Whether a space is put before a string."""
    return bool(_space_rules(spec))


def _space_rules(spec: dict[str, Any]) -> bool | None:
    """Whether a space is put before a string; None where spaces do not become ▁ and nothing else."""
    normalizer, pre = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers") or ([normalizer] if normalizer else [])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    if not pre:
        return {1: False, 2: True}[len(steps)] if steps in ([replace], [prepend, replace]) else None
    if steps or pre.get("type") != "Metaspace" or pre.get("replacement") != _SPACE or pre.get("split"):
        return None
    return pre.get("prepend_scheme", "always") != "never"
