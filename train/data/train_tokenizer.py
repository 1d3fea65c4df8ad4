"""`nemoe-train tokenizer`: a byte-level BPE tokenizer from text, with the control tokens of a chat.

The directory that it makes is a tokenizer's of Hugging Face, with a ChatML template: a response ends with <|im_end|>, a
document with </s>.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from nemoe_jax.errors import UserError
from nemoe_jax.text.data.formats import Chat, Completion, to_document
from nemoe_jax.text.data.messages import BadRow, EmptyRow
from nemoe_jax.text.data.sources import find_all
from nemoe_jax.utils.output_path import refuse_existing, staging_path

CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|pad|>")  # the first three as ids 0, 1 and 2
BYTES = 256
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(sources: Sequence[str], destination: Path, vocab: int) -> dict[str, Any]:
    """Makes a tokenizer's directory; returns the figures.

    Args:
        sources: files, globs, directories and `hf:` data sets of any format that training takes.
        vocab: tokens in all, control tokens and the 256 bytes included.

    Raises:
        UserError: too few tokens or more than the text gives, no text, a row that is none, or the destination exists.
    """
    least = len(CONTROL) + BYTES
    if vocab < least:
        raise UserError(f"--vocab: expected at least {least}, for {BYTES} bytes and {len(CONTROL)} control tokens")
    refuse_existing(destination)
    found, counts = find_all(sources), {"documents": 0, "bytes": 0}

    def texts() -> Iterator[str]:
        for text in (text for source in found for place, row in source.read() for text in _texts(place, row)):
            counts["documents"] += 1
            counts["bytes"] += len(text.encode())
            yield text

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts(), trainer)
    if not counts["documents"]:
        raise UserError(f"{', '.join(sources)}: empty text")
    if model.get_vocab_size() < vocab:
        raise UserError(
            f"--vocab: expected at most the {model.get_vocab_size()} tokens that the text gives, got {vocab}"
        )
    bos, end, im_end = (CONTROL.index(name) for name in ("<s>", "</s>", "<|im_end|>"))
    model.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", bos)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": TEMPLATE,
    }
    contents = {
        "tokenizer.json": model.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps({"eos_token_id": [end, im_end]}, indent=2),
    }
    _write(destination, contents)
    return {"vocab": vocab, **counts}


def _texts(place: str, row: Any) -> list[str]:
    """What there is to read in a row."""
    try:
        if isinstance(row, BadRow):
            raise row
        document = to_document(row)
    except EmptyRow:
        return []
    except BadRow as error:
        raise UserError(f"{place}: {error}") from error
    if isinstance(document, Chat):
        return [text for message in document.messages if isinstance(text := message.get("content"), str)]
    return [document.prompt + document.completion] if isinstance(document, Completion) else [document]


def _write(destination: Path, contents: dict[str, str]) -> None:
    partial = staging_path(destination)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, content in contents.items():
            (partial / name).write_text(content + "\n", "utf-8")
        partial.rename(destination)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{destination}: {error.strerror}") from error
