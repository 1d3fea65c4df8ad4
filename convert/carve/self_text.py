"""Calibration text that the dense model writes itself, for `--calibration self`, where no text is at hand.

Each sequence starts with the token that begins a document (an instruct model then writes whole chats), is sampled at
a temperature and with a seed of its own, and goes on behind an end of document. The temperatures take turns, so that
the fits and the part held out of them see all. Of sequences that begin alike one is kept: a model without much to say
repeats itself.
"""

import json
from typing import NamedTuple

import numpy as np

from convert.layerwise import BATCH, SEQUENCE_LENGTH
from nemoe_jax.checkpoints.pretrained import load_pretrained
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.inference.generate import generate
from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.text.tokenizers.load import load_tokenizer
from nemoe_jax.utils.progress import progress_bar

SELF = "self"
FILE = "calibration.jsonl"  # beside the manifest
TEMPERATURES = (0.7, 0.85, 1.0)
ROWS = 32  # sequences that are sampled together, at most
ALIKE = 24  # sequences whose first so many tokens are equal count as one
ATTEMPTS = 4  # times as many sequences as are wanted, at most


class SelfText(NamedTuple):
    """Sampled sequences."""

    batches: list[np.ndarray]  # int32 (B, T + 1) each
    lines: str  # JSONL of what each sequence is: text, temperature, seed


def sample_text(source: Checkpoint, tokens: int, seed: int) -> SelfText:
    """`tokens` tokens in all, rounded up to whole batches.

    Raises:
        UserError: no tokenizer, none of its tokens begins or ends a document, or the model repeats itself too much.
    """
    tokenizer = load_tokenizer(source.directory)
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if first is None:
        raise UserError(f"{source.directory}: --calibration self: expected a tokenizer with a BOS or EOS token")
    length = min(SEQUENCE_LENGTH, source.config.context - 1)
    wanted = -(-tokens // (BATCH * length)) * BATCH
    config, params = load_pretrained(source, progress=True)
    known_V = tokenizer.known(config.vocab)
    kept: dict[bytes, tuple[np.ndarray, SamplingParams]] = {}
    drawn, rows = 0, min(ROWS, wanted)
    with progress_bar() as bar:
        task = bar.add_task("sampling calibration text", total=wanted)
        while len(kept) < wanted:
            if drawn >= ATTEMPTS * wanted + BATCH:
                raise UserError(
                    f"{source.directory}: --calibration self: {drawn} sequences begin in {len(kept)} ways only, "
                    f"expected {wanted}; give text to --calibration"
                )
            sampling = [
                SamplingParams(temperature=TEMPERATURES[number % len(TEMPERATURES)], seed=(seed + number) % 2**64)
                for number in range(drawn, drawn + rows)
            ]
            given = generate(config, params, [[first]] * rows, length, sampling, known_V=known_V)
            tokens_BT = np.concatenate([np.full((rows, 1), first), np.stack(list(given), axis=1)], axis=1)
            for row, drawn_by in zip(tokens_BT.astype(np.int32), sampling, strict=True):
                kept.setdefault(row[:ALIKE].tobytes(), (row, drawn_by))
            drawn += rows
            bar.update(task, completed=min(len(kept), wanted))
    sequences = list(kept.values())[:wanted]
    records = (
        {"text": tokenizer.decode(row[1:]), "temperature": drawn_by.temperature, "seed": drawn_by.seed}
        for row, drawn_by in sequences
    )
    stacked = np.stack([row for row, _ in sequences])
    return SelfText(list(stacked.reshape(-1, BATCH, length + 1)), "".join(json.dumps(one) + "\n" for one in records))
