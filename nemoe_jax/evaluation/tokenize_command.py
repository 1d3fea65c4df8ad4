"""`nemoe tokenize`: text as token ids."""

import argparse
import json
import sys
from pathlib import Path

from nemoe_jax.command import Command
from nemoe_jax.errors import UserError


def add(command: Command) -> None:
    """Registers `tokenize`."""
    parser = command.add(
        "tokenize",
        _tokenize,
        "print the token ids of text as a JSON list",
        "Control tokens that the text spells out, such as [INST], stay plain text.",
    )
    parser.add_argument(
        "tokenizer", metavar="DIR|FILE", help="a model directory, tekken.json, tokenizer.json or tokenizer.model"
    )
    parser.add_argument(
        "file", nargs="?", default="-", metavar="FILE|-", help="text to tokenise (default: standard input)"
    )
    parser.add_argument(
        "--chat", metavar="FILE", help="tokenise a JSON list of messages in the model's chat format instead"
    )
    parser.add_argument("--pieces", action="store_true", help="print the text of each token instead of its id")


def _tokenize(arguments: argparse.Namespace) -> None:
    from nemoe_jax import chat
    from nemoe_jax.tokenizer import load_tokenizer, text_from_bytes

    tokenizer = load_tokenizer(arguments.tokenizer)
    if arguments.chat:
        ids = chat.render_chat(tokenizer, chat.read_messages(arguments.chat), tools=chat.read_tools(arguments.chat))
    else:
        try:
            data = sys.stdin.buffer.read() if arguments.file == "-" else Path(arguments.file).read_bytes()
        except OSError as error:
            raise UserError(f"{arguments.file}: {error.strerror}") from error
        ids = tokenizer.encode(text_from_bytes(data))
    print(json.dumps([tokenizer.piece(token) for token in ids] if arguments.pieces else ids, ensure_ascii=False))
