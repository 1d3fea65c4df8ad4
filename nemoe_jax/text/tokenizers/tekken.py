"""Tekken, Mistral's byte-level BPE, from its `tekken.json` on tiktoken.

The file lists the vocabulary by rank, 256 single bytes first. Ids 0 … n − 1 are the n control tokens (1000 in
published files, of which 20 are named); the id of a rank is rank + n. The vocabulary is cut to `default_vocab_size −
n` ranks, and byte-pair merges go by rank, so a shorter cut is again a complete tokenizer: `cut_tekken` makes small
ones.
"""

import base64
import binascii
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import tiktoken

from nemoe_jax.errors import UserError
from nemoe_jax.text.tokenizers.base import Tokenizer, runs
from nemoe_jax.utils.json_file import read_json

# The control tokens of files that list none, which are those up to version 7.
UNLISTED = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)
LAST_UNLISTED_VERSION = 7
BYTES = 256


def filler(token: int) -> str:
    """The name of a reserved control token."""
    return f"<SPECIAL_{token}>"


class Tekken(Tokenizer):
    """A tokenizer from the parsed JSON of a `tekken.json`."""

    kind = "tekken"

    def __init__(self, path: Path, spec: dict[str, Any]):
        config = read_config(path, spec)
        names = control_names(path, spec)
        ranks = mergeable_ranks(path, spec["vocab"], config["default_vocab_size"] - len(names))
        self.path = path
        self.version = config["version"]
        self.vocab_size = config["default_vocab_size"]
        self.control = {name: i for i, name in enumerate(names)}
        self.bos_id = self.control_id("<s>")
        self.eos_id = self.control_id("</s>")
        self.before = (self.bos_id,)
        self._names = names
        self._control_ids = set(self.control.values())
        try:
            self._encoding = tiktoken.Encoding(
                path.name,
                pat_str=config["pattern"],
                mergeable_ranks=ranks,
                special_tokens={},  # control tokens unknown to the library cannot be read from text
            )
        except ValueError as error:
            raise UserError(f"{path}: config.pattern is no regular expression ({error})") from error

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes of ids, control tokens left out; lossless, where `decode` replaces what is no UTF-8."""
        first = len(self._names)
        return self._encoding.decode_bytes([i - first for i in self._check(ids) if i >= first])

    def _piece(self, token: int) -> str:
        if token < len(self._names):
            return self._names[token]
        data = self.decode_bytes([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in data)

    def _encode_text(self, text: str) -> list[int]:
        first = len(self._names)
        return [rank + first for rank in self._encoding.encode_ordinary(text)]

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        text = []
        for is_control, run in runs(ids, self._control_ids):
            if not is_control:
                text.append(self.decode_bytes(run).decode("utf-8", "replace"))
            elif not skip_special:
                text.extend(self._names[i] for i in run)
        return "".join(text)


def cut_tekken(source: str | Path, destination: str | Path, vocab_size: int) -> None:
    """Writes a `tekken.json` of `vocab_size` ids in all, with the first ranks of `source`, for a small model.

    Ids of named control tokens stay; of the reserved ones, only as many are kept as come before the last named one (20
    control tokens in place of 1000 for Tekken of July 2024), so that few of the model's embeddings are idle.
    """
    source, destination = Path(source), Path(destination)
    spec = read_json(source)
    config = read_config(source, spec)
    names = control_names(source, spec)
    while names and names[-1] == filler(len(names) - 1):
        names.pop()
    largest = len(names) + min(len(spec["vocab"]), config["default_vocab_size"] - config["default_num_special_tokens"])
    if not len(names) + BYTES <= vocab_size <= largest:
        raise UserError(f"{source}: expected a cut of {len(names) + BYTES} … {largest} ids, got {vocab_size}")
    if destination.exists():
        raise UserError(f"{destination} exists already")
    listed = {token["token_str"]: token for token in spec.get("special_tokens") or []}
    ranks = vocab_size - len(names)
    cut = {
        **spec,
        "config": {
            **config,
            "num_vocab_tokens": ranks,
            "default_vocab_size": vocab_size,
            "default_num_special_tokens": len(names),
        },
        "special_tokens": [
            listed.get(name, {"rank": i, "token_str": name, "is_control": True}) for i, name in enumerate(names)
        ],
        "vocab": spec["vocab"][:ranks],
    }
    Tekken(source, cut)  # raises before anything is written
    destination.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=destination.parent, prefix=destination.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(cut, file)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(destination)
    except BaseException:
        Path(temporary).unlink()
        raise


def read_config(path: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """The `config` of a Tekken file, after a look at each key that is used."""
    config = spec.get("config")
    if not isinstance(config, dict) or not isinstance(spec.get("vocab"), list):
        raise UserError(f"{path}: not a Tekken file: expected the keys config (an object) and vocab (a list)")
    kinds = {"pattern": str, "default_vocab_size": int, "default_num_special_tokens": int, "version": str}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            raise UserError(f"{path}: config.{key}: expected a {kind.__name__}, got {config.get(key)!r}")
    version = config["version"]
    if not (version[:1] == "v" and version[1:].isdecimal()):
        raise UserError(f"{path}: config.version: expected v3, v7, …, got {version!r}")
    return config


def control_names(path: Path, spec: dict[str, Any]) -> list[str]:
    """Names of the control tokens by id: those that the file lists, or the unlisted ones, then reserved ones."""
    listed, count = spec.get("special_tokens"), spec["config"]["default_num_special_tokens"]
    if listed is None:
        if int(spec["config"]["version"][1:]) > LAST_UNLISTED_VERSION:
            raise UserError(f"{path}: expected the key special_tokens in a file of version {spec['config']['version']}")
        names = list(UNLISTED)
    else:
        try:
            names = [str(token["token_str"]) for token in sorted(listed, key=lambda token: token["rank"])]
            ranks = sorted(int(token["rank"]) for token in listed)
        except (TypeError, KeyError) as error:
            raise UserError(f"{path}: special_tokens: expected a list of rank and token_str ({error!r})") from error
        if ranks != list(range(len(names))) or len(set(names)) != len(names):
            raise UserError(f"{path}: special_tokens: expected ranks 0 … {len(names) - 1} and distinct names")
    if len(names) > count:
        raise UserError(f"{path}: {len(names)} special_tokens, but config.default_num_special_tokens is {count}")
    return names + [filler(i) for i in range(len(names), count)]


def mergeable_ranks(path: Path, vocab: list[dict[str, Any]], count: int) -> dict[bytes, int]:
    """The first `count` entries of the vocabulary as tiktoken expects them: bytes to rank."""
    if not BYTES <= count <= len(vocab):
        raise UserError(f"{path}: expected {BYTES} … {len(vocab)} ranks as vocab has, the config asks for {count}")
    ranks: dict[bytes, int] = {}
    for i, token in enumerate(vocab[:count]):
        try:
            piece = base64.b64decode(token["token_bytes"], validate=True)
            if token["rank"] != i or (i < BYTES and piece != bytes([i])) or piece in ranks:
                raise ValueError("the rank is not its place, or the bytes are not distinct")
        except (TypeError, KeyError, ValueError, binascii.Error) as error:
            raise UserError(f"{path}: vocab[{i}] is no Tekken entry: {error!r}") from error
        ranks[piece] = i
    return ranks
