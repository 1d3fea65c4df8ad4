"""Continuous batching against the fixed batch of `generate`, on the same model, prompts and machine.

    python -m benchmarks.serving.batching DIR               (a model directory with a tokenizer; a few minutes)

Tokens per second, prompts included, of 8 requests at a time that the serving engine answers, and of a lone one in the
same engine. Named peer: `generate` with a batch of 8, which has no joining, no stop strings and no text at all, and
with a batch of one. They take turns, and the best turn of each counts; compilation is done before. Limits: alone 0.9 of
the peer's tokens per second, and with 8 requests 0.95. Beside it, without limits: `deterministic`, where a lone request
pays for the places of the other slots, as the batch always has the same shape.
"""

import argparse
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.lib.results import add_keep, keep, machine

ROWS, PROMPT, NEW = 8, 32, 256
LIMITS = {"engine / generate, 1 request": 0.9, "engine / generate, 8 requests": 0.95}


def main() -> None:
    """Measures, prints, and says whether the limits are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a model directory")
    parser.add_argument("--turns", type=int, default=7, help="turns of each; figures are of the best (default 7)")
    add_keep(parser)
    options = parser.parse_args()
    rates = measure(options.directory, options.turns)
    for name, rate in rates.items():
        print(f"{name:28}{rate:10.0f} tokens/s")
    ratios = {
        f"{engine} / generate, {requests}": rates[f"{engine}, {requests}"] / rates[f"generate, {requests}"]
        for engine in ("engine", "deterministic")
        for requests in ("1 request", "8 requests")
    }
    for name, ratio in ratios.items():
        print(f"{name:36}{ratio:6.2f}" + (f" (limit {LIMITS[name]})" if name in LIMITS else ""))
    if options.keep:
        keep(f"batching-{jax.default_backend()}", {**machine(), "tokens per second": rates, "ratios": ratios})
    sys.exit(any(ratios[name] < limit for name, limit in LIMITS.items()))


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

    def start(deterministic: bool) -> Engine:
        return Engine(config, params, tokenizer, max_num_seqs=ROWS, kv_tokens=ROWS * 512, deterministic=deterministic)

    with start(False) as engine, start(True) as fixed_shape:
        runs: dict[str, tuple[int, Any]] = {
            "generate, 1 request": (1, lambda: fixed(1)),
            "generate, 8 requests": (ROWS, lambda: fixed(ROWS)),
            "engine, 1 request": (1, lambda: joining(engine, 1)),
            "engine, 8 requests": (ROWS, lambda: joining(engine, ROWS)),
            "deterministic, 1 request": (1, lambda: joining(fixed_shape, 1)),
            "deterministic, 8 requests": (ROWS, lambda: joining(fixed_shape, ROWS)),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(turns + 1):
            for name, (requests, run) in runs.items():
                started = time.perf_counter()
                run()
                if turn:
                    rates[name].append(requests * NEW / (time.perf_counter() - started))
    return {name: max(values) for name, values in rates.items()}


if __name__ == "__main__":
    main()
