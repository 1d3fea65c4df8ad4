"""A tokenizer as llguidance sees it: the bytes of each token, which of them are control tokens, which end an answer."""

import json
import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemoe_jax.errors import UserError
from nemoe_jax.text.tokenizers.base import Tokenizer
from nemoe_jax.text.tokenizers.hf_tokenizer import TokenizerJson
from nemoe_jax.text.tokenizers.sentencepiece_tokenizer import SentencePiece
from nemoe_jax.text.tokenizers.tekken import Tekken

if TYPE_CHECKING:
    import llguidance

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece writes a token of one byte
_UNKNOWN = "<unk>"


class TokenBytes:
    """A tokenizer's tokens for a model; made once. What llguidance needs is built when it is first asked for.

    vocab_size: rows of the model's embedding; those without a token in the tokenizer are never allowed.
    end_tokens: what ends an answer besides the tokenizer's own end token.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        own = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        self.end_tokens = tuple(token for token in dict.fromkeys([*own, *end_tokens]) if 0 <= token < vocab_size)
        self._lock = threading.Lock()
        self._library: llguidance.LLTokenizer | None = None

    @property
    def library(self) -> "llguidance.LLTokenizer":
        """llguidance's tables. Raises UserError where a text is not its tokens' bytes, one after another."""
        with self._lock:
            if self._library is None:
                self._library = self._build()
            return self._library

    @property
    def leading_space(self) -> bool:
        """Whether the tokenizer writes a space in front of a text, which is none of the text's own."""
        return self.library.decode_bytes(self.tokenizer.encode("{")).startswith(b" ")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for control tokens and rows without a token."""
        if token >= self.tokenizer.vocab_size or token in self.tokenizer.control.values():
            return b""
        try:
            return self.library.decode_bytes([token])
        except UserError:
            return self.tokenizer.piece(token).encode()

    def _build(self) -> "llguidance.LLTokenizer":
        import llguidance

        tokenizer = self.tokenizer
        if not self.end_tokens:
            raise UserError(f"{tokenizer.path}: no end token, which an answer of a given form needs")
        ends = list(self.end_tokens)
        if isinstance(tokenizer, TokenizerJson):
            spec = json.dumps(with_control_marked(tokenizer.read_spec(), tokenizer))
            rows = max(self.vocab_size, tokenizer.vocab_size)
            try:
                return llguidance.LLTokenizer(spec, n_vocab=rows, eos_token=ends)
            except ValueError as error:
                raise UserError(
                    f"{tokenizer.path}: its tokens do not spell a text byte by byte, as constrained answers and tool "
                    f"calls need ({error})"
                ) from error
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Spelling(self)), eos_token=ends)


class _Spelling:
    """The tokens of Tekken and SentencePiece, as llguidance asks for them."""

    def __init__(self, vocabulary: TokenBytes):
        tokenizer = vocabulary.tokenizer
        assert isinstance(tokenizer, Tekken | SentencePiece)
        spell = tekken_bytes if isinstance(tokenizer, Tekken) else sentencepiece_bytes
        special = {*tokenizer.control.values(), *vocabulary.end_tokens}
        spelled = [None if token in special else spell(tokenizer, token) for token in range(tokenizer.vocab_size)]
        pieces = dict(enumerate(spelled))
        rows = range(max(vocabulary.vocab_size, tokenizer.vocab_size))
        self.special_token_ids = [token for token in rows if pieces.get(token) is None]
        self.tokens = [pieces.get(token) or f"<token {token}>".encode() for token in rows]
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = vocabulary.end_tokens[0]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"))


def tekken_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes of one of Tekken's tokens."""
    return tokenizer.decode_bytes([token])


def sentencepiece_bytes(tokenizer: Any, token: int) -> bytes | None:
    """The bytes of a piece; None for the unknown one, which stands for any text."""
    piece = tokenizer.piece(token)
    byte = _BYTE.fullmatch(piece)
    return None if piece == _UNKNOWN else bytes([int(byte[1], 16)]) if byte else piece.encode()


def with_control_marked(spec: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A `tokenizer.json` in which every control token is an added token that is marked special."""
    others = [token for token in spec.get("added_tokens") or [] if token["content"] not in tokenizer.control]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    marked = [{**plain, "id": i, "content": name} for name, i in tokenizer.control.items()]
    return {**spec, "added_tokens": sorted([*others, *marked], key=lambda token: token["id"])}
