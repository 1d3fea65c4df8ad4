"""What constrained decoding costs on the host, with Tekken's full vocabulary.

    python -m benchmarks.serving.structured

Prints the time to make a vocabulary, to compile a schema and 128 tools, and the time of a token: `allowed`, the bits of
131072 tokens, and `accept`. The tokens are those of a random model that is kept to the grammar. Limits, set by hand:
half a millisecond for a token (median of both) and 100 ms to compile. Exit status 1 where one is missed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np

from benchmarks.lib.results import add_keep, keep, machine
from nemoe_jax.serving.engine.request import Constraint
from nemoe_jax.serving.structured.grammar import TokenBytes, json_object, json_schema, tool_calls
from nemoe_jax.text.tokenizers.load import load_tokenizer

TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
ADDRESS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 40},
        "lines": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        "post_code": {"type": "string", "pattern": "^[0-9]{4}$"},
        "north": {"type": "number", "minimum": -90, "maximum": 90},
    },
    "required": ["city", "lines", "post_code", "north"],
    "additionalProperties": False,
}
ANSWERS, LONGEST = 20, 300
TOKEN_LIMIT, COMPILE_LIMIT = 500e-6, 0.1  # seconds


def main() -> None:
    """Measures, prints, and says whether the limits are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_keep(parser)
    options = parser.parse_args()
    tokenizer = load_tokenizer(TEKKEN)
    vocabulary = TokenBytes(tokenizer, tokenizer.vocab_size)
    print(f"vocabulary of {vocabulary.vocab_size}: {seconds(lambda: vocabulary.library):.2f} s, once")
    tools = [{"type": "function", "function": {"name": f"find_{at}", "parameters": ADDRESS}} for at in range(128)]
    kinds: dict[str, Callable[[], Constraint | None]] = {
        "any JSON object": lambda: json_object(vocabulary),
        "a schema": lambda: json_schema(vocabulary, ADDRESS),
        "a call, 1 tool": lambda: tool_calls(vocabulary, tokenizer, tools[:1], "required"),
        "a call, 128 tools": lambda: tool_calls(vocabulary, tokenizer, tools, "required"),
        "auto, before a call": lambda: tool_calls(vocabulary, tokenizer, tools, "auto"),
    }
    figures, missed = {}, False
    print(f"{'':20} compile/ms  allowed/µs: median, 99 %  accept/µs: median, 99 %  of the limits: compile, token")
    for name, make in kinds.items():
        compiling = min(seconds(make) for _ in range(5))
        times = np.concatenate([drive(vocabulary, make(), seed) for seed in range(ANSWERS)])
        (middle, high), (middle_accept, high_accept) = np.percentile(1e6 * times, (50, 99), axis=0).T
        shares = compiling / COMPILE_LIMIT, 1e-6 * (middle + middle_accept) / TOKEN_LIMIT
        missed |= max(shares) > 1
        figures[name] = {"compile_ms": 1e3 * compiling, "allowed_us": [middle, high]}
        figures[name] |= {"accept_us": [middle_accept, high_accept], "shares_of_limits": shares}
        print(f"{name:20} {1e3 * compiling:10.1f} {middle:19.0f} {high:6.0f}", end=" ")
        print(f"{middle_accept:16.0f} {high_accept:6.0f} {shares[0]:23.3f} {shares[1]:6.3f}")
    if options.keep:
        keep("structured", {"median and 99 %": figures, **machine(("llguidance", "mistral-common"))})
    sys.exit(int(missed))


def seconds(action: Callable[[], Any]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def drive(vocabulary: TokenBytes, constraint: Constraint | None, seed: int) -> np.ndarray:
    """Seconds of `allowed` and of `accept` for each token of an answer, (T, 2)."""
    assert constraint is not None
    rng, times = np.random.default_rng(seed), []
    wanted = np.zeros(vocabulary.vocab_size)
    wanted[[vocabulary.tokenizer.encode("a" + mark)[-1] for mark in '"}],'] + list(vocabulary.end_tokens)] = 12
    begin = vocabulary.tokenizer.control_id("[TOOL_CALLS]")
    for _ in range(LONGEST):
        start = time.perf_counter()
        words = constraint.allowed()
        between = time.perf_counter()
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
        allowed[begin] &= allowed.sum() == 1  # only where it must
        token = int(np.where(allowed, wanted + rng.normal(size=wanted.size), -np.inf).argmax())
        again = time.perf_counter()
        constraint.accept(token)
        times.append((between - start, time.perf_counter() - again))
        if token in vocabulary.end_tokens:
            break
    return np.array(times)


if __name__ == "__main__":
    main()
