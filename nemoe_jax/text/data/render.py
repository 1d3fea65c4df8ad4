"""Documents as token ids, and which of them are to be predicted.

A text is learned token by token, the token that closes it included. Of a prompt with its completion, only the
completion is; of a chat, in the model's own format, only what the assistant says: its answers, its tool calls and the
token that ends each.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from nemoe_jax.errors import UserError
from nemoe_jax.text.chat.render import encode_with_assistant_mask
from nemoe_jax.text.data.formats import Completion, Document, to_document
from nemoe_jax.text.data.messages import BadRow
from nemoe_jax.text.data.sources import PlacedRow
from nemoe_jax.text.tokenizers.base import Tokenizer

ROWS_AT_ONCE = 64
CHARACTERS_AT_ONCE = 1 << 20  # of texts given to a thread together


class Rendered(NamedTuple):
    """A document of N tokens."""

    ids_N: np.ndarray  # uint32
    mask_N: np.ndarray  # bool: whether that id is to be predicted
    is_chat: bool  # which must stay whole, as a prompt with its completion must


def encode_document(tokenizer: Tokenizer, document: Document) -> Rendered:
    """A document as the model reads it.

    Raises:
        BadRow: a chat that the tokenizer's chat format does not take, or whose template leaves all answers out.
    """
    if isinstance(document, str):
        ids = tokenizer.encode_document(document)
        return Rendered(np.array(ids, np.uint32), np.ones(len(ids), bool), is_chat=False)
    if isinstance(document, Completion):
        start = len(tokenizer.before) + len(tokenizer.encode(document.prompt))
        ids = tokenizer.encode_document(document.prompt + document.completion)
        return Rendered(np.array(ids, np.uint32), np.arange(len(ids)) >= start, is_chat=True)
    try:
        ids, mask = encode_with_assistant_mask(tokenizer, document.messages, document.tools)
    except UserError as error:
        raise BadRow(str(error)) from error
    except RecursionError as error:
        raise BadRow("nested too deeply") from error
    mask_N = np.array(mask, bool)
    if not mask_N.any():
        raise BadRow(f"{tokenizer.path}: its chat format leaves out every answer")
    return Rendered(np.array(ids, np.uint32), mask_N, is_chat=True)


def encode_row(tokenizer: Tokenizer, row: Any, form: str) -> Rendered:
    """The document of a row; raises BadRow where `to_document` or `encode_document` does."""
    return encode_document(tokenizer, to_document(row, form))


def encode_rows(
    rows: Iterable[PlacedRow],
    tokenizer: Tokenizer,
    form: str,
    pool: ThreadPoolExecutor,
    in_flight: int,
    encode: Callable[[Tokenizer, Any, str], Any] = encode_row,
) -> Iterator[list[Any]]:
    """The outcomes of all rows, some at a time and in order; of the rows, little is read ahead.

    Args:
        form: a row format, or `auto`.
        pool: threads that encode; encoders release the interpreter's lock.
        in_flight: groups of rows that are encoded at once.
        encode: makes an outcome of (tokenizer, row, form), or raises BadRow.
    """
    waiting: deque[Future[list[Any]]] = deque()
    for group in _groups(rows):
        waiting.append(pool.submit(_encode, group, tokenizer, form, encode))
        if len(waiting) >= in_flight:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _groups(rows: Iterable[PlacedRow]) -> Iterator[list[PlacedRow]]:
    """The rows in lists for a thread each."""
    group: list[PlacedRow] = []
    characters = 0
    for place, row in rows:
        group.append((place, row))
        characters += len(row) if isinstance(row, str) else 0
        if len(group) == ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _encode(
    group: list[PlacedRow], tokenizer: Tokenizer, form: str, encode: Callable[[Tokenizer, Any, str], Any]
) -> list[Any]:
    outcomes: list[Any] = []
    for place, row in group:
        try:
            if isinstance(row, BadRow):
                raise row
            outcomes.append(encode(tokenizer, row, form))
        except BadRow as error:
            outcomes.append(type(error)(f"{place}: {error}"))
    return outcomes
