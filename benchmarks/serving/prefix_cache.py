"""What a chat's next message costs that has a long conversation before it, with and without the prefix cache.

    python -m benchmarks.serving.prefix_cache DIR           (a model directory with a tokenizer; some minutes)

Seconds from a request to its first token: of a conversation's first turn, whose prompt has 2,000 tokens, and of its
second, whose prompt has the first one, the 32 tokens that were generated and 30 more. Named peer: the same engine
without the prefix cache. They take turns, each with conversations that were never there before, and the best turn of
each counts; compilation is done before. Limit: the second turn's first token comes in an eighth of the peer's time.
Beside it: in how many conversations both generated the same tokens.
"""

import argparse
import sys
import time

import jax
import numpy as np

from benchmarks.lib.results import add_keep, keep, machine

FIRST, NEW, MORE, LIMIT = 2000, 32, 30, 8.0


def main() -> None:
    """Measures, prints, and says whether the limit is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a model directory")
    parser.add_argument("--turns", type=int, default=3, help="conversations with each; the best counts (default 3)")
    add_keep(parser)
    options = parser.parse_args()
    seconds, same, conversations = measure(options.directory, options.turns)
    for name, value in seconds.items():
        print(f"{name:40}{1000 * value:10.1f} ms")
    ratio = seconds["without, second turn"] / seconds["prefix cache, second turn"]
    print(f"second turn, without / with {ratio:.1f} (limit {LIMIT})")
    print(f"the same tokens in {same} of {conversations} conversations")
    if options.keep:
        figures = {"seconds to the first token": seconds, "ratio": ratio, "same tokens": [same, conversations]}
        keep(f"prefix_cache-{jax.default_backend()}", {**machine(), **figures})
    sys.exit(ratio < LIMIT)


def measure(directory: str, turns: int) -> tuple[dict[str, float], int, int]:
    """Seconds by name; how many conversations had the same tokens with both, and how many there were."""
    from nemoe_jax.checkpoints import pretrained
    from nemoe_jax.serving.engine.engine import Engine
    from nemoe_jax.serving.engine.request import Request
    from nemoe_jax.text.tokenizers.load import load_tokenizer

    config, params = pretrained.load_pretrained(directory)
    tokenizer = load_tokenizer(directory)
    draw = np.random.default_rng(0)

    def ask(engine: Engine, prompt: list[int]) -> tuple[float, list[int]]:
        """Seconds to the first token, and all tokens."""
        started, first = time.perf_counter(), None
        answer = engine.submit(Request(tuple(prompt), NEW, ignore_eos=True))
        for output in answer:
            if first is None and output.tokens:
                first = time.perf_counter() - started
        assert first is not None and answer.error is None, answer.error
        return first, [scored.token for scored in answer.tokens]

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
    return {name: min(values) for name, values in seconds.items()}, same, turns


if __name__ == "__main__":
    main()
