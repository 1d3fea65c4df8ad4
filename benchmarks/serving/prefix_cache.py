"""What a chat's next message costs that has a long conversation before it, with and without the prefix cache.

    python -m benchmarks.serving.prefix_cache DIR           (a model directory with a tokenizer; some minutes)

Seconds from a request to its first token: of a conversation's first turn, whose prompt has 2,000 tokens, and of its
second, whose prompt has the first one, the 32 tokens that were generated and 30 more. Named peer: the same engine
without the prefix cache. They take turns, each with conversations that were never there before, and the best turn of
each counts; compilation is done before. Limit: the second turn's first token comes in an eighth of the peer's time.
Beside it: in how many conversations both generated the same tokens.
"""

from collections.abc import Callable

import numpy as np

from benchmarks.lib.peers import clock, judge, opened, parser

FIRST, NEW, MORE = 2000, 32, 30
LIMITS = {"second turn, without / with": 8.0}


def main() -> None:
    """Measures, prints, and says whether the limit is kept."""
    options = parser(__doc__, 3).parse_args()
    seconds, same = measure(options.directory, options.turns, clock(options))
    ratio = seconds["without, second turn"] / seconds["prefix cache, second turn"]
    ratios = dict.fromkeys(LIMITS, ratio)
    judge(
        "prefix_cache",
        options,
        seconds,
        "seconds to the first token",
        ratios,
        LIMITS,
        same_tokens=[same, options.turns],
    )


def measure(directory: str, turns: int, now: Callable[[], float]) -> tuple[dict[str, float], int]:
    """Seconds by name; and in how many of the conversations both generated the same tokens."""
    from nemoe_jax.serving.engine.engine import Engine
    from nemoe_jax.serving.engine.request import Request

    config, params, tokenizer = opened(directory)
    draw = np.random.default_rng(0)

    def ask(engine: Engine, prompt: list[int]) -> tuple[float, list[int]]:
        """Seconds to the first token, and all tokens."""
        started, first = now(), None
        response = engine.submit(Request(tuple(prompt), NEW, ignore_eos=True))
        for output in response:
            if first is None and output.tokens:
                first = now() - started
        assert first is not None and response.error is None, response.error
        return first, [scored.token for scored in response.tokens]

    def start(prefix_cache: bool) -> Engine:
        return Engine(config, params, tokenizer, max_num_seqs=1, kv_tokens=8192, prefix_cache=prefix_cache)

    seconds: dict[str, list[float]] = {}
    same = 0
    with start(True) as with_cache, start(False) as without:
        for turn in range(turns + 1):
            first, more = (draw.integers(3, config.vocab, size).tolist() for size in (FIRST, MORE))
            given = []
            for name, engine in (("prefix cache", with_cache), ("without", without)):
                first_seconds, tokens = ask(engine, first)
                second_seconds, then = ask(engine, [*first, *tokens, *more])
                given.append((tokens, then))
                if turn:  # the first one compiles
                    seconds.setdefault(f"{name}, first turn", []).append(first_seconds)
                    seconds.setdefault(f"{name}, second turn", []).append(second_seconds)
            same += bool(turn) and given[0] == given[1]
    return {name: min(values) for name, values in seconds.items()}, same


if __name__ == "__main__":
    main()
