"""Text files as tokens: files → documents → one stream, and evenly spaced windows of it.

Documents follow one another in a single stream, each closed by the end-of-sequence token.

B batch, T sequence.
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nemoe_jax.errors import UserError
from nemoe_jax.text.tokenizers.load import Tokenizer
from nemoe_jax.utils.progress import progress_bar

TEXT_SUFFIXES = (".txt", ".jsonl")
CHARACTERS_IN_FLIGHT = 8_000_000  # bounds the text held in memory while tokenizing


def find_files(
    patterns: Sequence[str], exclude: Iterable[Path] = (), suffixes: Sequence[str] = TEXT_SUFFIXES
) -> list[Path]:
    """The files of paths, globs and directories (their files of those suffixes), sorted, each once.

    Raises:
        UserError: a pattern that matches no file, or nothing left after the exclusion.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = [file for suffix in suffixes for file in path.rglob(f"*{suffix}")]
        elif path.is_file():
            matches = [path]
        else:
            try:
                matches = list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            except ValueError as error:  # such as a**b
                raise UserError(f"{pattern}: {error}") from error
        matches = [match for match in matches if match.is_file()]
        if not matches:
            kinds = " and ".join(suffixes)
            raise UserError(f"{pattern}: no text there; expected a file, a glob, or a directory of {kinds} files")
        found.update(match.resolve() for match in matches)
    left = sorted(found - {path.resolve() for path in exclude})
    if not left:
        raise UserError(f"{', '.join(patterns)}: every file there is held out")
    return left


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a file, but for empty ones: the "text" of each line of a .jsonl file, else the file as a whole.

    Raises:
        UserError: not UTF-8, or a line that is no JSON object with a "text".
    """
    if path.suffix != ".jsonl":
        try:
            text = path.read_bytes().decode("utf-8")  # line ends as they are
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(f"{path}: expected UTF-8 text, got byte 0x{byte:02x} at {error.start}") from error
        if text.strip():
            yield text
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f'{path}:{number}: expected a JSON object with a "text", got {line[:60]!r}') from error
            if not isinstance(text, str):
                raise UserError(f'{path}:{number}: "text": expected a string, got {type(text).__name__}')
            if text.strip():
                yield text


def tokenize_files(
    files: Sequence[Path], tokenizer: Tokenizer, description: str = "tokenize", vocab: int | None = None
) -> np.ndarray:
    """All documents of the files as one stream, each closed by EOS: uint16 where the vocabulary allows, else uint32.

    Args:
        vocab: rows of the embedding that the tokens are for.

    Raises:
        UserError: the files hold no text, a file cannot be read (see `read_documents`), or a token has no row.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    encode = functools.partial(tokenizer.encode, eos=True)
    pieces: list[np.ndarray] = []
    with progress_bar() as bar, ThreadPoolExecutor(os.cpu_count()) as pool:  # encoders release the interpreter's lock
        tracked = bar.track(files, description=description)
        for group in _groups(document for file in tracked for document in read_documents(file)):
            pieces.extend(np.asarray(ids, dtype) for ids in pool.map(encode, group))
    if not pieces:
        names = ", ".join(map(str, files[:3])) + (", …" if len(files) > 3 else "")
        raise UserError(f"{names}: empty text")
    stream = np.concatenate(pieces)
    if vocab is not None and stream.max() >= vocab:
        raise UserError(f"{tokenizer.path}: gives token {stream.max()}; the model's embedding has {vocab} rows")
    return stream


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
    """The documents in lists of about CHARACTERS_IN_FLIGHT."""
    group: list[str] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document)
        if characters >= CHARACTERS_IN_FLIGHT:
            yield group
            group, characters = [], 0
    if group:
        yield group


def spaced_batches(
    stream: np.ndarray, sequence_length: int, batch_size: int, batches: int, name: str = "text"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """At most `batches` batches of evenly spaced windows, in order: tokens (B, T + 1) and the rows' weights (B,).

    A short text gives fewer windows; the last batch is then filled up with rows of weight 0.
    """
    windows = min(batches * batch_size, count_windows(stream, sequence_length, name))
    starts = np.linspace(0, len(stream) - sequence_length - 1, windows).astype(np.int64)
    result = []
    for first in range(0, windows, batch_size):
        rows = starts[first : first + batch_size]
        weights = (np.arange(batch_size) < len(rows)).astype(np.float32)
        result.append((cut(stream, np.resize(rows, batch_size), sequence_length), weights))
    return result


def count_windows(stream: np.ndarray, sequence_length: int, name: str = "text") -> int:
    """How many windows of T predicted tokens the stream holds; `name` says in errors which text it is.

    Raises:
        UserError: not even one.
    """
    windows = (len(stream) - 1) // sequence_length
    if windows < 1:
        raise UserError(
            f"{name}: expected at least sequence length + 1 = {sequence_length + 1} tokens, got {len(stream)}"
        )
    return windows


def cut(stream: np.ndarray, starts: np.ndarray, sequence_length: int) -> np.ndarray:
    """The windows (B, T + 1), int32, that begin at `starts` (B,)."""
    return stream[starts[:, None] + np.arange(sequence_length + 1)].astype(np.int32)
