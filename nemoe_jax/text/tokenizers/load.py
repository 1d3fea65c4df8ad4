"""Loads the tokenizer of a model, whatever its kind.

    tokenizer = load_tokenizer("models/nemo")       # or …/tekken.json, …/tokenizer.model.v3, …/tokenizer.json
    ids = tokenizer.encode_prompt("Hello")
    tokenizer.decode(ids)

Text is read as text: control tokens that it spells out stay characters. Chats are rendered by `nemoe_jax.text.chat`.
"""

from pathlib import Path

from nemoe_jax.checkpoints.gguf.directory import model_directory
from nemoe_jax.errors import UserError
from nemoe_jax.text.tokenizers.base import Tokenizer, text_from_bytes
from nemoe_jax.text.tokenizers.hf_tokenizer import TokenizerJson
from nemoe_jax.text.tokenizers.sentencepiece_json import SentencePieceDirectory, has_side_files
from nemoe_jax.text.tokenizers.sentencepiece_tokenizer import VERSION, SentencePiece
from nemoe_jax.text.tokenizers.streaming import StreamDecoder
from nemoe_jax.text.tokenizers.tekken import Tekken, cut_tekken
from nemoe_jax.utils.json_file import read_json

__all__ = ["StreamDecoder", "Tokenizer", "cut_tekken", "load_tokenizer", "text_from_bytes"]

# What a model directory may hold, most faithful first.
FILES = ("tekken.json", "tekken*.json", "tokenizer.json", "tokenizer.model*", "*.model", "*.model.v*")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model directory, or of one file: Tekken's JSON, `tokenizer.json`, a SentencePiece model, GGUF.

    A directory's `tekken.json` goes before its `tokenizer.json`, and that before `tokenizer.model`. The files beside
    these last two (`tokenizer_config.json`, chat templates, …) are read as well; a `tokenizer.model` that is named
    itself is read alone.

    Raises:
        UserError: no such file, or one that cannot be read.
    """
    path = model_directory(path)
    if path.is_dir():
        path = find_file(path)
        if has_side_files(path):
            return SentencePieceDirectory(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or directory")
    if VERSION.search(path.name):
        return SentencePiece(path)
    if path.suffix != ".json":
        raise UserError(f"{path}: unknown kind of tokenizer (expected tekken.json, tokenizer.json or tokenizer.model)")
    spec = read_json(path)
    if path.name.startswith("tekken") or "config" in spec:
        return Tekken(path, spec)
    return TokenizerJson(path, spec)


def find_file(directory: Path) -> Path:
    """The tokenizer file of a model directory; of several by one pattern, the last by name, which is the newest."""
    for pattern in FILES:
        found = sorted(file for file in directory.glob(pattern) if file.suffix == ".json" or VERSION.search(file.name))
        if found:
            return found[-1]
    raise UserError(f"{directory}: no tokenizer (expected tekken.json, tokenizer.json or tokenizer.model)")
