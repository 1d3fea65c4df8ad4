"""Documents as token ids, and which of them are to be predicted.

A text is learned token by token, its end-of-sequence token included. Of a chat, in the model's own format, only what
the assistant says is learned: its answers, its tool calls and the token that ends each.
"""

from typing import NamedTuple

import numpy as np

from nemoe_jax.errors import UserError
from nemoe_jax.text.chat.render import encode_with_assistant_mask
from nemoe_jax.text.tokenizers.load import Tokenizer
from train.data.formats import BadRow, Chat, Document


class Rendered(NamedTuple):
    """A document of N tokens."""

    ids_N: np.ndarray  # uint32
    mask_N: np.ndarray  # bool: whether that id is to be predicted
    is_chat: bool


def encode_document(tokenizer: Tokenizer, document: Document) -> Rendered:
    """A document as the model reads it.

    Raises:
        BadRow: a chat that the tokenizer's chat format does not take, or whose template leaves all answers out.
    """
    if not isinstance(document, Chat):
        ids = tokenizer.encode(document, eos=True)
        return Rendered(np.array(ids, np.uint32), np.ones(len(ids), bool), is_chat=False)
    try:
        ids, spoken = encode_with_assistant_mask(tokenizer, document.messages, document.tools)
    except UserError as error:
        raise BadRow(str(error)) from error
    except RecursionError as error:
        raise BadRow("nested too deeply") from error
    mask_N = np.array(spoken, bool)
    if not mask_N.any():
        raise BadRow(f"{tokenizer.path}: its chat format leaves out every answer")
    return Rendered(np.array(ids, np.uint32), mask_N, is_chat=True)
