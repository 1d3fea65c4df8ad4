"""Tokenized documents on disk: written once for each source, tokenizer and format, then read through memory maps.

An entry is a directory, named by a hash of all that its tokens depend on:

    tokens.bin    the documents' tokens one after another, uint16 or uint32
    mask.bin      a bit for each token, packed as np.packbits does: whether it is to be predicted
    offsets.npy   (D + 1,) int64: document d holds tokens offsets[d] … offsets[d + 1]
    chats.npy     (D,) bool: whether document d is a chat, which no row may cut
    entry.json    figures, and a checksum of each file

It is written under a temporary name and takes its own when complete; one that is damaged is written anew.

Letters: D documents, N tokens.
"""

import contextlib
import json
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nemoe_jax.errors import UserError
from nemoe_jax.text.data.render import Rendered
from nemoe_jax.utils.compilation_cache import cache_home

VERSION = 2  # of what the files hold and of how rows become tokens; another one leaves old entries alone
FILES = ("tokens.bin", "mask.bin", "offsets.npy", "chats.npy")
CHUNK = 1 << 24  # bytes of which a checksum is taken at once


class Tokens(NamedTuple):
    """An entry, open for reading."""

    tokens_N: np.ndarray
    mask: np.ndarray  # uint8, eight tokens in each
    offsets: np.ndarray
    chats_D: np.ndarray
    figures: dict[str, Any]  # what the writer was given

    def mask_of(self, start: int, stop: int) -> np.ndarray:
        """The mask of tokens start … stop, bool."""
        first = start // 8
        bits = np.unpackbits(self.mask[first : -(-stop // 8)])
        return bits[start - 8 * first : stop - 8 * first].astype(bool)


def default_cache() -> Path:
    """`nemoe-jax` in the user's directory of caches."""
    return cache_home()


def open_entry(path: Path) -> Tokens | None:
    """The entry of that name; None where there is none, or it is damaged."""
    try:
        entry = json.loads((path / "entry.json").read_bytes())
        if any(checksum(path / name) != entry["checksums"][name] for name in FILES):
            return None
        offsets, chats_D = np.load(path / "offsets.npy"), np.load(path / "chats.npy")
        tokens_N = np.memmap(path / "tokens.bin", entry["dtype"], "r")
        mask = np.memmap(path / "mask.bin", np.uint8, "r")
        return Tokens(tokens_N, mask, offsets, chats_D, entry["figures"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


class Writer:
    """Writes an entry; a context manager that leaves nothing behind unless `finish` was called.

    Raises UserError where the cache cannot be written.
    """

    def __init__(self, path: Path, dtype: type[np.unsignedinteger]):
        self.path, self.dtype = path, dtype
        self._offsets, self._chats = array("q", [0]), array("b")
        self._rest = np.empty(0, bool)  # mask bits that do not fill a byte yet
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
            self._tokens = (self._staging / "tokens.bin").open("wb")
            self._mask = (self._staging / "mask.bin").open("wb")
        except OSError as error:
            raise UserError(f"data.cache: {path.parent}: {error.strerror}") from error

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._tokens, self._mask):
            with contextlib.suppress(OSError):  # a full disk does not take what is left in the buffer either
                file.close()
        shutil.rmtree(self._staging, ignore_errors=True)

    def add(self, documents: Iterable[Rendered]) -> None:
        """Appends documents."""
        added = list(documents)
        try:
            for ids_N, _, is_chat in added:
                self._tokens.write(ids_N.astype(self.dtype).tobytes())
                self._offsets.append(self._offsets[-1] + len(ids_N))
                self._chats.append(is_chat)
            bits = np.concatenate([self._rest, *(mask_N for _, mask_N, _ in added)])
            whole = len(bits) // 8 * 8
            self._mask.write(np.packbits(bits[:whole]).tobytes())
            self._rest = bits[whole:]
        except OSError as error:
            raise UserError(f"data.cache: {self._staging.parent}: {error.strerror}") from error

    def finish(self, figures: dict[str, Any]) -> None:
        """Completes the entry and gives it its name, in place of a damaged one."""
        try:
            self._mask.write(np.packbits(self._rest).tobytes())
            self._tokens.close()
            self._mask.close()
            np.save(self._staging / "offsets.npy", np.array(self._offsets, np.int64))
            np.save(self._staging / "chats.npy", np.array(self._chats, bool))
            checksums = {name: checksum(self._staging / name) for name in FILES}
            entry = {"dtype": np.dtype(self.dtype).name, "checksums": checksums, "figures": figures}
            (self._staging / "entry.json").write_text(json.dumps(entry), "utf-8")
            try:
                self._staging.rename(self.path)
            except OSError:  # there is one: damaged, or another process's that wrote the same and may be reading it
                if open_entry(self.path) is None:
                    shutil.rmtree(self.path, ignore_errors=True)
                    with contextlib.suppress(OSError):  # another process may be mending it as well
                        self._staging.rename(self.path)
        except OSError as error:
            raise UserError(f"data.cache: {self._staging.parent}: {error.strerror}") from error
