"""Continuous batching against the fixed batch of `generate`, on the same model, prompts and machine.

    python -m benchmarks.serving.batching DIR               (a model directory with a tokenizer; a few minutes)

Tokens per second, prompts included, of 8 requests at a time that the serving engine generates, and of a lone one in the
same engine. Named peer: `generate` with a batch of 8, which has no joining, no stop strings and no text at all, and
with a batch of one. They take turns, and the best turn of each counts; compilation is done before. Limits: alone 0.9 of
the peer's tokens per second, and with 8 requests 0.95. Beside it, without limits: `deterministic`, where a lone request
pays for the places of the other slots, as the batch always has the same shape.
"""

import time
from typing import Any

import numpy as np

from benchmarks.lib.peers import judge, opened, parser

ROWS, PROMPT, NEW = 8, 32, 256
LIMITS = {"engine / generate, 1 request": 0.9, "engine / generate, 8 requests": 0.95}


def main() -> None:
    """Measures, prints, and says whether the limits are kept."""
    options = parser(__doc__, 7).parse_args()
    rates = measure(options.directory, options.turns)
    ratios = {
        f"{engine} / generate, {requests}": rates[f"{engine}, {requests}"] / rates[f"generate, {requests}"]
        for engine in ("engine", "deterministic")
        for requests in ("1 request", "8 requests")
    }
    judge("batching", options, rates, "tokens per second", ratios, LIMITS)


def measure(directory: str, turns: int) -> dict[str, float]:
    """Tokens per second by name."""
    from nemoe_jax.inference.generate import generate
    from nemoe_jax.serving.engine.engine import Engine
    from nemoe_jax.serving.engine.request import Request

    config, params, tokenizer = opened(directory)
    config, tokenizer.eos_id = config.replace(eos_token_id=None), None  # every response as long as the others
    prompts = np.random.default_rng(0).integers(3, config.vocab, (ROWS, PROMPT)).tolist()

    def fixed(rows: int) -> None:
        for _ in generate(config, params, prompts[:rows], NEW):
            pass

    def joining(engine: Engine, requests: int) -> None:
        for response in [engine.submit(Request(tuple(prompt), NEW)) for prompt in prompts[:requests]]:
            response.result()

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
