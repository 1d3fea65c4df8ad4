"""Rows of preference data sets as pairs of documents: a prompt with a chosen and with a rejected response.

    {"prompt": …, "chosen": …, "rejected": …}                 TRL: strings are plain text, lists of messages a chat
    {"chosen": …, "rejected": …}                              TRL, implicit prompt: what both begin with
    {"prompt": "…", "chosen": [messages], "rejected": [messages], "score_chosen": …, "score_rejected": …}
                                                              UltraFeedback, binarized: the messages hold the prompt
    {"instruction": "…", "completions": [{"response": …, "overall_score": …}, …]}
                                                              UltraFeedback: the best and the worst of the completions

Only the response is learned, whatever the assistant said before it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from nemoe_jax.text.data.formats import Completion, Document, exported_from_arrow, to_document, without_nulls
from nemoe_jax.text.data.messages import BadRow, parsed, read_message, shown
from nemoe_jax.text.data.render import Rendered, encode_document
from nemoe_jax.text.tokenizers.base import Tokenizer

SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))


class Pair(NamedTuple):
    """A prompt with two responses."""

    chosen: Document
    rejected: Document
    scores: tuple[float, float] | None = None  # of chosen and rejected, by whoever judged them


class RenderedPair(NamedTuple):
    """A pair as the model reads it."""

    chosen: Rendered
    rejected: Rendered
    scores: tuple[float, float] | None


def encode_pair(tokenizer: Tokenizer, row: Any, form: str) -> RenderedPair:
    """A row as tokens.

    Raises:
        BadRow: it holds no pair, chosen and rejected are the same, or the chat format does not take it.
    """
    pair = to_pair(row)
    chosen, rejected = (encode_document(tokenizer, document) for document in pair[:2])
    if np.array_equal(chosen.ids_N, rejected.ids_N):
        raise BadRow("chosen and rejected are the same")
    for name, document in (("chosen", chosen), ("rejected", rejected)):
        if document.mask_N[0] or not document.mask_N.any():
            raise BadRow(f"{name}: expected a prompt and a response")
    return RenderedPair(chosen, rejected, pair.scores)


def to_pair(row: Any) -> Pair:
    """The pair that a row holds.

    Raises:
        BadRow: not an object, keys missing or of a wrong type, chosen and rejected the same.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object, got {shown(row)}")
    row = without_nulls(dict(row)) if exported_from_arrow(row) or None in row.values() else row
    if "completions" in row and "chosen" not in row:
        return _best_and_worst(row)
    if "chosen" not in row or "rejected" not in row:
        raise BadRow(f"expected the keys chosen and rejected, got {', '.join(map(str, row)) or '(none)'}")
    chosen, rejected = (_value(row, key) for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    if isinstance(chosen, str) and isinstance(rejected, str):
        documents = _texts(row, chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        documents = _chats(row, chosen, rejected)
    else:
        raise BadRow("chosen and rejected: expected two texts or two lists of messages")
    return Pair(*documents, _scores(row))


def _value(row: Mapping[str, Any], key: str) -> str | list[Any]:
    """A text, or the messages of a list or of its JSON text."""
    value = row[key]
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = parsed(value, key)
    if isinstance(value, Mapping):  # a single message
        value = [value]
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, list) or not value:
        raise BadRow(f"{key}: expected a text or a list of messages, got {shown(value)}")
    return [read_message(message, f"{key}[{at}]") for at, message in enumerate(value)]


def _texts(row: Mapping[str, Any], chosen: str, rejected: str) -> tuple[Document, Document]:
    if "prompt" in row:
        prompt = _value(row, "prompt")
        if not isinstance(prompt, str):
            both = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
            return _chats(row, *both)
        return Completion(prompt, chosen), Completion(prompt, rejected)
    at = _common(chosen, rejected)
    if at and chosen[at - 1] == " ":  # a word's space belongs to the word
        at -= 1
    prompt = chosen[:at]
    if not prompt:
        raise BadRow("prompt: expected one, or texts that begin alike")
    if not (chosen[at:] and rejected[at:]):
        raise BadRow("chosen and rejected: expected two responses, got one that continues the other")
    return Completion(prompt, chosen[at:]), Completion(prompt, rejected[at:])


def _chats(row: Mapping[str, Any], chosen: list[Any], rejected: list[Any]) -> tuple[Document, Document]:
    prompt: Any = _value(row, "prompt") if "prompt" in row else None
    if chosen[0]["role"] != "assistant":  # the whole conversation, and what a text beside it says again
        shared = _common(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt:
        raise BadRow("prompt: expected one, or conversations that begin alike")
    if not (chosen and rejected):
        raise BadRow("chosen and rejected: expected two responses, got one that continues the other")
    beside = {key: row[key] for key in ("system", "tools") if key in row}
    first, second = (
        to_document(beside | {"prompt": list(prompt), "completion": response}, "prompt-completion")
        for response in (chosen, rejected)
    )
    return first, second


def _common(one: Any, other: Any) -> int:
    """How far two sequences are the same."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _best_and_worst(row: Mapping[str, Any]) -> Pair:
    asked, completions = row.get("instruction"), row["completions"]
    if not isinstance(asked, str) or not asked.strip():
        raise BadRow(f"instruction: expected a text, got {shown(asked)}")
    if not isinstance(completions, list):
        raise BadRow(f"completions: expected a list, got {shown(completions)}")
    judged = []
    for completion in completions:
        score = _number(completion.get("overall_score")) if isinstance(completion, Mapping) else None
        if score is not None and isinstance(completion.get("response"), str) and completion["response"].strip():
            judged.append((score, completion["response"]))
    judged.sort(key=lambda one: -one[0])
    if len(judged) < 2 or judged[0][0] == judged[-1][0]:
        raise BadRow("completions: expected two with different values of overall_score")
    (best, chosen), (worst, rejected) = judged[0], judged[-1]
    messages = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return Pair(*_chats({"prompt": asked}, *messages), (best, worst))


def _scores(row: Mapping[str, Any]) -> tuple[float, float] | None:
    for names in SCORES:
        best, worst = (_number(row.get(name)) for name in names)
        if best is not None and worst is not None:
            return best, worst
    return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None
