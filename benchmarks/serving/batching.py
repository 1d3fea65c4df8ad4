"""Continuous batching against the fixed batch of `generate`, on the same model, prompts and machine.

    python -m benchmarks.serving.batching DIR               (a model directory with a tokenizer; a few minutes)

Tokens per second, prompts included, of 8 requests at a time that the serving engine generates, and of a lone one in the
same engine. Named peer: `generate` with a batch of 8, which has no joining, no stop strings and no text at all, and
with a batch of one. They take turns, and the best turn of each counts; compilation is done before. Limits: alone 0.9 of
the peer's tokens per second, and with 8 requests 0.95. Beside it, without limits: `deterministic`, where a lone request
pays for the places of the other slots, as the batch always has the same shape. And the tokens per second of 7 requests
whose eighth neighbor is held to a JSON schema, in turn with 7 beside a free one: limit 0.9.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.lib.peers import clock, judge, opened, parser

SLOTS, PROMPT = 8, 32
BESIDE = "7 beside a constrained one / beside a free one"
LIMITS = {"engine / generate, 1 request": 0.9, "engine / generate, 8 requests": 0.95, BESIDE: 0.9}
COLORS = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1024}  # longer than a response


def main() -> None:
    """Measures, prints, and says whether the limits are kept."""
    flags = parser(__doc__, 7)
    flags.add_argument("--new", type=int, default=256, help="tokens of a response (default 256)")
    options = flags.parse_args()
    rates = measure(options.directory, options.new, options.turns, clock(options))
    ratios = {
        f"{engine} / generate, {requests}": rates[f"{engine}, {requests}"] / rates[f"generate, {requests}"]
        for engine in ("engine", "deterministic")
        for requests in ("1 request", "8 requests")
    }
    ratios[BESIDE] = rates["7 beside a constrained one"] / rates["7 beside a free one"]
    judge("batching", options, rates, "tokens per second", ratios, LIMITS)


def measure(directory: str, new: int, turns: int, now: Callable[[], float]) -> dict[str, float]:
    """Tokens per second by name."""
    from nemoe_jax.inference.generate import generate
    from nemoe_jax.serving.engine.engine import Engine
    from nemoe_jax.serving.engine.request import Request
    from nemoe_jax.serving.request_builder import RequestBuilder

    config, params, tokenizer = opened(directory)
    builder = RequestBuilder(config, tokenizer)
    config, tokenizer.eos_id = config.replace(eos_token_id=None), None  # every response as long as the others
    prompts = np.random.default_rng(0).integers(3, config.vocab, (SLOTS, PROMPT)).tolist()

    def fixed(requests: int) -> None:
        for _ in generate(config, params, prompts[:requests], new):
            pass

    def joining(engine: Engine, requests: int) -> None:
        for response in [engine.submit(Request(tuple(prompt), new)) for prompt in prompts[:requests]]:
            response.result()

    def beside(engine: Engine, constrained: bool) -> Callable[[], Any]:
        """Generates, up to the end of 7; what waits for the eighth."""
        one = Request(tuple(prompts[-1]), new, constraint=builder.constraint(schema=COLORS) if constrained else None)
        eighth = engine.submit(one)
        joining(engine, SLOTS - 1)
        return eighth.result

    def start(deterministic: bool) -> Engine:
        return Engine(config, params, tokenizer, max_num_seqs=SLOTS, kv_tokens=SLOTS * 512, deterministic=deterministic)

    with start(False) as engine, start(True) as fixed_shape:
        runs: dict[str, tuple[int, Callable[[], Any]]] = {
            "generate, 1 request": (1, lambda: fixed(1)),
            "generate, 8 requests": (SLOTS, lambda: fixed(SLOTS)),
            "engine, 1 request": (1, lambda: joining(engine, 1)),
            "engine, 8 requests": (SLOTS, lambda: joining(engine, SLOTS)),
            "7 beside a free one": (SLOTS - 1, lambda: beside(engine, False)),
            "7 beside a constrained one": (SLOTS - 1, lambda: beside(engine, True)),
            "deterministic, 1 request": (1, lambda: joining(fixed_shape, 1)),
            "deterministic, 8 requests": (SLOTS, lambda: joining(fixed_shape, SLOTS)),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(turns + 1):
            for name, (requests, run) in runs.items():
                started = now()
                rest = run()
                if turn:
                    rates[name].append(requests * new / (now() - started))
                if rest:
                    rest()
    return {name: max(values) for name, values in rates.items()}


if __name__ == "__main__":
    main()
