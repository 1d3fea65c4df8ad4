"""Text as one stream of tokens, and evenly spaced windows of it: for calibration, perplexity and comparisons.

The sources are those of training: files of text, JSON Lines, JSON and Parquet, and data sets of Hugging Face, whose
rows are texts, prompts with completions, or chats in the model's own format. Documents follow one another in a single
stream, each with what the tokenizer puts around a text, and closed by the end-of-sequence token.

B batch, T sequence.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nemoe_jax.errors import UserError
from nemoe_jax.text.data.formats import to_document
from nemoe_jax.text.data.messages import BadRow, EmptyRow
from nemoe_jax.text.data.render import encode_rows
from nemoe_jax.text.data.sources import find_all, find_files, read_file
from nemoe_jax.text.tokenizers.base import Tokenizer
from nemoe_jax.utils.progress import progress_bar

__all__ = ["TEXT_SUFFIXES", "count_windows", "cut", "find_files", "read_documents", "spaced_batches", "tokenize_corpus"]

TEXT_SUFFIXES = (".txt", ".jsonl")


def read_documents(path: Path) -> Iterator[str]:
    """The texts of a file, but for empty ones: the "text" of each row, or a text file as a whole.

    Raises:
        UserError: the file cannot be read, or a row is no text.
    """
    for place, row in read_file(path):
        try:
            if isinstance(row, BadRow):
                raise row
            yield str(to_document(row, "text"))
        except EmptyRow:
            continue
        except BadRow as error:
            raise UserError(f"{place}: {error}") from error


def tokenize_corpus(
    words: Sequence[str], tokenizer: Tokenizer, description: str = "tokenize", vocab: int | None = None
) -> np.ndarray:
    """All documents of the sources as one stream: uint16 where the vocabulary allows, else uint32.

    Args:
        words: paths, globs, directories, and data sets as `hf:NAME` (see `find_all`).
        description: of the progress bar.
        vocab: rows of the embedding that the tokens are for.

    Raises:
        UserError: the sources are missing or hold no text, a row cannot be read, or a token has no row.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    documents: list[np.ndarray] = []
    sources, threads = find_all(words), os.cpu_count() or 1
    with progress_bar() as bar, ThreadPoolExecutor(threads) as pool:
        rows = (row for source in sources for row in source.read())
        task = bar.add_task(description, total=None)
        for outcomes in encode_rows(rows, tokenizer, "auto", pool, 2 * threads):
            for outcome in outcomes:
                if isinstance(outcome, EmptyRow):
                    continue
                if isinstance(outcome, BadRow):
                    raise UserError(str(outcome))
                documents.append(outcome.ids_N.astype(dtype))
            bar.update(task, completed=len(documents))
    if not documents:
        raise UserError(f"{', '.join(words)}: empty text")
    stream = np.concatenate(documents)
    if vocab is not None and stream.max() >= vocab:
        raise UserError(f"{tokenizer.path}: gives token {stream.max()}; the model's embedding has {vocab} rows")
    return stream


def spaced_batches(
    stream: np.ndarray, sequence_length: int, batch_size: int, batches: int, name: str = "text"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """At most `batches` batches of evenly spaced windows, in order: tokens (B, T + 1) and the windows' weights (B,).

    A short text gives fewer windows; the last batch is then filled up with windows of weight 0.
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
