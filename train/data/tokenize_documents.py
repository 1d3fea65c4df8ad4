"""A source's rows as tokens on disk: read, brought into one form, rendered and encoded by threads, or found there.

Malformed rows are left out and counted, or end the run, as the recipe says. Rows are encoded out of order but kept in
order: the number of threads changes nothing.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nemoe_jax.errors import UserError
from nemoe_jax.text.data.messages import BadRow
from nemoe_jax.text.data.render import Rendered, encode_row, encode_rows
from nemoe_jax.text.data.sources import Rows, find_dataset, find_rows
from nemoe_jax.text.tokenizers.load import Tokenizer
from nemoe_jax.utils.progress import progress_bar
from train.data.preference_rows import RenderedPair, encode_pair
from train.data.token_cache import VERSION, Tokens, Writer, default_cache, open_entry
from train.recipe import Data, Source

SHOWN = 3  # bad rows that an error quotes


def tokenize_source(
    source: Source,
    data: Data,
    tokenizer: Tokenizer,
    vocab: int,
    name: str,
    exclude: Iterable[Path] = (),
    threads: int | None = None,
    pairs: bool = False,
) -> Tokens:
    """The documents of a source as tokens, from the cache where they are there.

    Of pairs, chosen and rejected are documents in turn; the entry's figures hold their scores.

    Args:
        vocab: rows of the embedding that the tokens are for.
        name: the recipe's key of the source, for errors.
        exclude: files that are left out.
        threads: that encode; by default as many as processors.
        pairs: whether a row is a pair of responses.

    Raises:
        UserError: nothing found, no document in it, too many bad rows, a token beyond the vocabulary.
    """
    if source.dataset is None:
        rows = find_rows(source.files, exclude)
    else:
        rows = find_dataset(source.dataset, source.subset, source.split, source.streaming)
    path = (data.cache or default_cache()) / "tokens" / _key(rows, source, tokenizer, pairs)
    tokens = open_entry(path)
    if tokens is None:
        _write(path, rows, source, data, tokenizer, vocab, name, threads or os.cpu_count() or 1, pairs)
        tokens = open_entry(path)
        if tokens is None:
            raise UserError(f"data.cache: {path}: damaged while it was written")
    _check_vocab(tokens.figures["largest"], tokenizer, vocab)
    _check_rows(tokens.figures["rows"], tokens.figures["bad_rows"], tokens.figures["bad"], data, name)
    return tokens


def _key(rows: Rows, source: Source, tokenizer: Tokenizer, pairs: bool) -> str:
    """A hash of all that the tokens depend on."""
    sums = {}
    for path in tokenizer.files:  # chat templates and the like among them
        with path.open("rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    depends = [VERSION, rows.identity, source.format, source.limit, sums, tokenizer.kind, tokenizer.version]
    depends += ["pairs"] if pairs else []
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]


def _write(
    path: Path,
    rows: Rows,
    source: Source,
    data: Data,
    tokenizer: Tokenizer,
    vocab: int,
    name: str,
    threads: int,
    pairs: bool,
) -> None:
    """Tokenizes the source into a new entry of the cache."""
    documents, seen, bad, largest = 0, 0, 0, 0
    first_bad: list[str] = []
    scores: list[tuple[float, float] | None] = []
    encode = encode_pair if pairs else encode_row
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    with Writer(path, dtype) as writer, progress_bar() as bar, ThreadPoolExecutor(threads) as pool:
        task = bar.add_task(f"tokenize {name}", total=source.limit)
        for outcomes in encode_rows(rows.read(), tokenizer, source.format, pool, 2 * threads, encode):
            good: list[Rendered] = []
            for outcome in outcomes:
                if documents == source.limit:
                    break
                seen += 1
                if isinstance(outcome, BadRow):
                    bad += 1
                    first_bad += [str(outcome)] if bad <= SHOWN else []
                    if data.bad_rows == "stop":
                        _check_rows(seen, bad, first_bad, data, name)
                else:
                    documents += 1
                    good += outcome[:2] if isinstance(outcome, RenderedPair) else [outcome]
                    scores += [outcome.scores] if isinstance(outcome, RenderedPair) else []
            largest = max([largest, *(int(document.ids_N.max()) for document in good)])
            _check_vocab(largest, tokenizer, vocab)
            writer.add(good)
            bar.update(task, completed=documents)
            if documents == source.limit:
                break
        if not documents:
            _check_rows(seen, bad, first_bad, data, name)
            raise UserError(f"{name}: {rows.name}: no document in it {_quoted(first_bad)}".rstrip())
        figures = {"documents": documents, "rows": seen, "bad_rows": bad, "bad": first_bad, "largest": largest}
        writer.finish(figures | ({"scores": scores} if pairs else {}))


def _check_vocab(largest: int, tokenizer: Tokenizer, vocab: int) -> None:
    if largest >= vocab:
        raise UserError(f"{tokenizer.path}: gives token {largest}; the model's embedding has {vocab} rows")


def _check_rows(seen: int, bad: int, first: list[str], data: Data, name: str) -> None:
    """Raises UserError where there are more bad rows than the recipe allows."""
    if bad and data.bad_rows == "stop":
        raise UserError(f"{name}: {first[0]} (data.bad_rows: skip leaves such rows out)")
    if bad > data.max_bad_share * seen:
        raise UserError(
            f"{name}: {bad} of {seen} rows are bad, and data.max_bad_share is {data.max_bad_share:g} {_quoted(first)}"
        )


def _quoted(bad: list[str]) -> str:
    return f"({'; '.join(bad)})" if bad else ""
