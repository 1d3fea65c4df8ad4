"""Which characters of a response are to be learned, where a data set says so (axolotl's `train_detail`).

A mark of a part is true or false for all of it, or has a byte for each character: LEARNED or LEFT_OUT. A token with a
character that is left out is left out itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nemoe_jax.errors import UserError
from nemoe_jax.text.tokenizers.base import LEARNED, LEFT_OUT, MarkedPart


def marked_parts(parts: Sequence[str | int], learned: bool, answers: Sequence[Mapping[str, Any]]) -> list[MarkedPart]:
    """The parts of a rendered response (or of several that were joined) with their marks.

    Raises:
        UserError: the text of a response with `train_detail` is not there as it was given.
    """
    if not learned or not any(answer.get("train_detail") for answer in answers):
        return [(part, learned) for part in parts]
    whole = "".join(part if isinstance(part, str) else "\0" for part in parts)
    marks = bytearray([LEARNED]) * len(whole)
    at = 0
    for answer in answers:
        content = answer.get("content")
        text = content if isinstance(content, str) else ""
        core = text.strip()
        begin = whole.find(core, at)
        if begin < 0:
            raise UserError(f"train_detail: the chat format does not keep the text of the response {core!r:.60}")
        at = begin + len(core)
        shift = begin - (len(text) - len(text.lstrip()))
        for detail in answer.get("train_detail") or []:
            if not detail["train"]:
                first, last = max(begin, shift + detail["begin_offset"]), min(at, shift + detail["end_offset"] + 1)
                marks[first:last] = bytes([LEFT_OUT]) * max(last - first, 0)
    result: list[MarkedPart] = []
    at = 0
    for part in parts:
        length = len(part) if isinstance(part, str) else 1
        result.append((part, bytes(marks[at : at + length]) if isinstance(part, str) else True))
        at += length
    return result
