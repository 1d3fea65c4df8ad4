"""Continuous batching against the fixed batch of `generate`, on the same model, prompts and machine.

    python -m benchmarks.serving.batching DIR               (a model directory with a tokenizer; a few minutes)

Tokens per second, prompts included, of 8 requests at a time that the serving engine answers, and of one alone in the
same engine: what the other rows' places cost. Named peer: `generate` with a batch of 8, which has no joining, no stop
texts and no text at all, and with a batch of one. They take turns; compilation is done before. Limits: the engine has
half of the peer's tokens per second with 8 rows, and with 8 requests twice those of one. A lone request pays for
the places of the other rows, as the batch always has the same shape: so its answer is the same whoever else is there.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.lib.results import add_keep, keep, machine

ROWS, PROMPT, NEW = 8, 32, 256
LIMITS = {"engine / generate, 8 rows": 0.5, "engine, 8 requests / 1": 2.0}


def main() -> None:
    """Measures, prints, and says whether the limits are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a model directory")
    parser.add_argument("--turns", type=int, default=7, help="turns of each; figures are of the median (default 7)")
    add_keep(parser)
    options = parser.parse_args()
    rates = measure(options.directory, options.turns)
    for name, rate in rates.items():
        print(f"{name:28}{rate:10.0f} tokens/s")
    ratios = {
        "engine / generate, 8 rows": rates["engine, 8 requests"] / rates["generate, 8 rows"],
        "engine, 8 requests / 1": rates["engine, 8 requests"] / rates["engine, 1 request"],
    }
    for name, ratio in ratios.items():
        print(f"{name:28}{ratio:10.2f} (limit {LIMITS[name]})")
    if options.keep:
        keep(f"batching-{jax.default_backend()}", {**machine(), "tokens per second": rates, "ratios": ratios})
    sys.exit(any(ratio < LIMITS[name] for name, ratio in ratios.items()))


def measure(directory: str, turns: int) -> dict[str, float]:
    """Tokens per second by name."""
    from nemoe_jax.checkpoints import pretrained
    from nemoe_jax.inference.generate import generate
    from nemoe_jax.serving.engine.engine import Engine
    from nemoe_jax.serving.engine.request import Request
    from nemoe_jax.text.tokenizers.load import load_tokenizer

    config, params = pretrained.load_pretrained(directory)
    config, tokenizer = config.replace(eos_token_id=None), load_tokenizer(directory)
    tokenizer.eos_id = None  # every answer as long as the others
    prompts = np.random.default_rng(0).integers(3, config.vocab, (ROWS, PROMPT)).tolist()

    def fixed(rows: int) -> None:
        for _ in generate(config, params, prompts[:rows], NEW):
            pass

    def joining(engine: Engine, requests: int) -> None:
        for answer in [engine.submit(Request(tuple(prompt), NEW)) for prompt in prompts[:requests]]:
            answer.result()

    with Engine(config, params, tokenizer, max_num_seqs=ROWS, kv_tokens=ROWS * 512) as engine:
        runs: dict[str, tuple[int, Any]] = {
            "generate, 1 row": (1, lambda: fixed(1)),
            "generate, 8 rows": (8, lambda: fixed(8)),
            "engine, 1 request": (1, lambda: joining(engine, 1)),
            "engine, 8 requests": (8, lambda: joining(engine, 8)),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(turns + 1):
            for name, (requests, run) in runs.items():
                started = time.perf_counter()
                run()
                if turn:
                    rates[name].append(requests * NEW / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in rates.items()}


if __name__ == "__main__":
    main()
