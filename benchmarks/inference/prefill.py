"""Memory of reading a long prompt, against what the scores of all pairs of its tokens would take.

    python -m benchmarks.inference.prefill                    (32,768 tokens, a model of two layers; half a minute)

Named limit: the float32 scores of one layer, heads x T x T; expected is a fiftieth of them. Ours is the resident set's
peak (Linux) up to the first token after the prompt, less what the process with the loaded model held before: the
key/value cache, the compiler and all else included.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.lib.results import add_keep, keep, machine
from nemoe_jax.inference.generate import generate
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import ModelConfig

LIMIT = 50.0
CONFIG = ModelConfig(
    family="mixtral",
    hidden=256,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=64,
    vocab=4096,
    experts=16,
    top_k=4,
    expert_ffn=64,
    context=131072,
    dtype="float32",
)


def resident(name: str) -> int:
    """VmRSS, the resident set, or VmHWM, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    """Reads a prompt of random tokens and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="of the prompt; default: 32768")
    add_keep(parser)
    options = parser.parse_args()
    params = schema.initialize(CONFIG, jax.random.key(0))
    jax.block_until_ready(params)
    prompt = np.random.default_rng(0).integers(0, CONFIG.vocab, options.tokens).tolist()
    before, started = resident("VmRSS"), time.perf_counter()
    next(generate(CONFIG, params, [prompt], 1))
    figures = {
        **machine(),
        "tokens": options.tokens,
        "seconds": time.perf_counter() - started,
        "bytes": resident("VmHWM") - before,
        "score_bytes": 4 * CONFIG.heads * options.tokens**2,
    }
    figures["ratio"] = figures["score_bytes"] / figures["bytes"]
    print(f"{options.tokens} tokens in {figures['seconds']:.1f} s, {figures['bytes'] / 1e6:.0f} MB beside the model")
    print(f"scores of all pairs, one layer: {figures['score_bytes'] / 1e6:.0f} MB")
    print(f"ratio {figures['ratio']:.0f} (limit {LIMIT:.0f})")
    if options.keep:
        keep("prefill-cpu", figures)
    sys.exit(figures["ratio"] < LIMIT)


if __name__ == "__main__":
    main()
