"""Calibration text that the dense model writes itself, for `--calibration self`, where no text is at hand.

Each sequence starts with the token that begins a document (an instruct model then writes whole chats), is sampled at
one of a few temperatures with a seed of its own, and goes on behind an end of document. Of sequences that begin alike
one is kept: a model without much to say repeats itself.
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
TEMPERATURES = (0.7, 1.0, 1.2)
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
    config, params = load_pretrained(source.directory, progress=True)
    known_V = tokenizer.known(config.vocab)
    kept: dict[bytes, tuple[np.ndarray, float, int]] = {}
    drawn = lot = 0
    rows = min(ROWS, -(-wanted // len(TEMPERATURES)))
    with progress_bar() as bar:
        task = bar.add_task("sampling calibration text", total=wanted)
        while len(kept) < wanted:
            if drawn >= ATTEMPTS * wanted + BATCH:
                raise UserError(
                    f"{source.directory}: --calibration self: {drawn} sequences begin in {len(kept)} ways only, "
                    f"expected {wanted}; give text to --calibration"
                )
            temperature = TEMPERATURES[lot % len(TEMPERATURES)]
            sampling = SamplingParams(temperature=temperature, seed=seed + drawn)  # row b draws by the seed + b
            given = generate(config, params, [[first]] * rows, length, sampling, known_V=known_V)
            tokens_BT = np.concatenate([np.full((rows, 1), first), np.stack(list(given), axis=1)], axis=1)
            for number, row in enumerate(tokens_BT.astype(np.int32)):
                kept.setdefault(row[:ALIKE].tobytes(), (row, temperature, seed + drawn + number))
            drawn, lot = drawn + rows, lot + 1
            bar.update(task, completed=min(len(kept), wanted))
    sequences = list(kept.values())[:wanted]
    records = (
        {"text": tokenizer.decode(row[1:]), "temperature": temperature, "seed": row_seed}
        for row, temperature, row_seed in sequences
    )
    stacked = np.stack([row for row, _, _ in sequences])
    return SelfText(list(stacked.reshape(-1, BATCH, length + 1)), "".join(json.dumps(one) + "\n" for one in records))
