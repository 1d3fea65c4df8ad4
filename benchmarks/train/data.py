"""Training data: how fast chats become tokens and rows, and how much of the rows is padding.

    python -m benchmarks.train.data          (20,000 chats; half a minute)

Named peer for encoding: mistral-common's own encoder, which takes one chat at a time on one core. Peers for packing: a
row for each chat, and chats put into rows in their order. The chats are made of the prose of Python's documentation,
with lengths drawn from a log-normal distribution.
"""

import argparse
import json
import os
import pydoc_data.topics
import tempfile
import time
from pathlib import Path

import mistral_common
import numpy as np
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from nemoe_jax.text.data.formats import to_document
from nemoe_jax.text.tokenizers.load import load_tokenizer
from train.data.loader import open_corpus
from train.data.packing import best_fit
from train.recipe import Data

TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
CHATS, PEERS_CHATS = 20_000, 1_000
LENGTH, BATCH = 2048, 16


def main() -> None:
    """Writes chats, encodes and packs them, prints figures and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = write_chats(Path(directory) / "chats.jsonl")
        data = Data(
            train=[f"{directory}/chats.jsonl"],
            sequence_length=LENGTH,
            batch_size=BATCH,
            cache=Path(directory) / "cache",
        )
        tokenizer = load_tokenizer(TEKKEN)
        (corpus, first), (_, again) = (timed(lambda: open_corpus(data.train, data, tokenizer, 1 << 17)) for _ in "ab")
        figures = corpus.figures[0]
        print(f"{figures.documents:,} chats of {figures.tokens / figures.documents:.0f} tokens, {os.cpu_count()} cores")

        theirs = MistralTokenizer.from_file(str(TEKKEN), mode=ValidationMode.finetuning)
        requests = [ChatCompletionRequest(messages=to_document(row).messages) for row in rows[:PEERS_CHATS]]
        encoded, seconds = timed(lambda: [theirs.encode_chat_completion(request).tokens for request in requests])
        peer = sum(map(len, encoded)) / seconds
        ours = figures.tokens / first
        print(f"read, rendered, encoded, stored: {ours:,.0f} tokens/s", end="")
        print(f", {ours / peer:.1f} times mistral-common's {peer:,.0f}; from the cache: {again:.2f} s")

        lengths = np.minimum(np.diff(corpus.packed[0].tokens.offsets), LENGTH)
        peers = {"in their order": in_order(lengths), "a row each": len(lengths)}
        print(f"padding at {LENGTH} tokens: best fit {figures.padding:.2%}", end="")
        print(*(f", {name} {padding(lengths, rows):.1%}" for name, rows in peers.items()), sep="")
        million = np.random.default_rng(0).choice(lengths, 1_000_000)
        print(f"packing a million chats: {timed(lambda: best_fit(million, LENGTH))[1]:.2f} s")

        batches = corpus.iterator(BATCH, seed=0)
        next(batches)
        seconds = timed(lambda: [next(batches) for _ in range(50)])[1]
        print(f"batches of {BATCH} rows: {50 * BATCH * LENGTH / seconds:,.0f} tokens/s")


def timed(work):
    """(result, seconds)."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def write_chats(path: Path) -> list[dict]:
    """Chats of one to three turns in ShareGPT's format."""
    words = " ".join(pydoc_data.topics.topics.values()).split()
    rng = np.random.default_rng(0)

    def text(median: float) -> str:
        count = min(int(median * rng.lognormal(0, 0.8)) + 1, 4000)
        start = rng.integers(len(words) - count)
        return " ".join(words[start : start + count])

    rows = [
        {
            "conversations": [
                {"from": ("human", "gpt")[turn % 2], "value": text((40, 200)[turn % 2])} for turn in range(2 * n)
            ]
        }
        for n in rng.integers(1, 4, CHATS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return rows


def in_order(lengths: np.ndarray) -> int:
    """Rows where each chat goes into the last row if it fits, else into a new one."""
    rows, room = 0, 0
    for length in lengths.tolist():
        if length > room:
            rows, room = rows + 1, LENGTH
        room -= length
    return rows


def padding(lengths: np.ndarray, rows: int) -> float:
    """Share of the rows' places that no chat takes."""
    return 1 - lengths.sum() / (rows * LENGTH)


if __name__ == "__main__":
    main()
