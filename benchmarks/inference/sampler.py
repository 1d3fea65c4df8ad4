"""What choosing the next tokens costs: 8 rows of NeMo's vocabulary of 131072, against transformers on torch.

    python -m benchmarks.inference.sampler                (CPU; half a minute)

Named peer: the processors that transformers' `generate` makes for the same sampling parameters, then torch's
multinomial or argmax; the same float32 logits, both sides one call after the other in one process. Figures are CPU time
of the process in milliseconds for a batch, each side's least of the turns: other work can only add to it, above all
where there are several threads (taskset -c 1). Limit: half of the peer's time where a token is drawn, its whole time
for the likeliest token.
"""

import argparse
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.generation import logits_process

from benchmarks.lib.results import add_keep, keep, machine
from nemoe_jax.inference.sampler import TokenCounts, controls, sample
from nemoe_jax.inference.sampling import PRESETS, SamplingParams

VOCAB, ROWS, HISTORY = 131072, 8, 512
CASES = {  # sampling parameters, and the share of the peer's time that they may take
    "greedy": (SamplingParams(), 1.0),
    "temperature": (SamplingParams(0.8), 0.5),
    "temperature, min-p": (SamplingParams(0.8, min_p=0.1), 0.5),
    "temperature, top-k 50": (SamplingParams(0.8, top_k=50), 0.5),
    "temperature, top-p 0.9": (SamplingParams(0.8, top_p=0.9), 0.5),
    "preset creative": (PRESETS["creative"], 0.5),
}


def by_transformers(sampling: SamplingParams, logits_BV: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
    """The next tokens, (B, 1)."""
    if sampling.repetition_penalty != 1:
        logits_BV = logits_process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(tokens_BT, logits_BV)
    if not sampling.temperature:
        return logits_BV.argmax(-1)
    logits_BV = logits_process.TemperatureLogitsWarper(sampling.temperature)(tokens_BT, logits_BV)
    if sampling.top_k:
        logits_BV = logits_process.TopKLogitsWarper(sampling.top_k)(tokens_BT, logits_BV)
    if sampling.top_p < 1:
        logits_BV = logits_process.TopPLogitsWarper(sampling.top_p)(tokens_BT, logits_BV)
    if sampling.min_p:
        logits_BV = logits_process.MinPLogitsWarper(sampling.min_p)(tokens_BT, logits_BV)
    return torch.multinomial(logits_BV.softmax(-1), 1)


def milliseconds(work: Callable[[], object], calls: int) -> float:
    """CPU time of a call."""
    start = time.process_time()
    for _ in range(calls):
        work()
    return (time.process_time() - start) / calls * 1e3


def main() -> None:
    """Times both sides in turns, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    add_keep(parser)
    options = parser.parse_args()
    device = jax.default_backend()
    if device != "cpu":
        return print(f"skipped: on {device} the process's CPU time says nothing")
    random = np.random.default_rng(0)
    logits_BV = 2 * random.standard_normal((ROWS, VOCAB)).astype(np.float32)
    tokens_BT = random.integers(VOCAB, size=(ROWS, HISTORY))
    ours_BV, theirs_BV, history_BT = jnp.asarray(logits_BV), torch.tensor(logits_BV), torch.tensor(tokens_BT)
    counts = TokenCounts.empty(ROWS, VOCAB).add_prompt(jnp.asarray(tokens_BT), jnp.full(ROWS, HISTORY))
    step_B, run = jnp.zeros(ROWS, jnp.int32), jax.jit(sample)
    figures, missed = {}, False
    print(f"{'':24}{'ours':>10}{'transformers':>14}{'share':>8}{'limit':>8}")
    for name, (sampling, limit) in CASES.items():
        inputs = jax.device_put(controls([sampling] * ROWS, VOCAB))

        def ours(inputs=inputs):
            run(ours_BV, inputs, counts, step_B).block_until_ready()

        def theirs(sampling=sampling):
            by_transformers(sampling, theirs_BV, history_BT)

        ours(), theirs()
        turns = [(milliseconds(ours, 10), milliseconds(theirs, 4)) for _ in range(options.turns)]
        mine, peer = (min(side) for side in zip(*turns, strict=True))
        missed |= mine > limit * peer
        figures[name] = {"ms": mine, "transformers_ms": peer, "share": mine / peer, "limit": limit}
        print(f"{name:24}{mine:7.2f} ms{peer:11.2f} ms{mine / peer:8.2f}{limit:8.2f}")
    if options.keep:
        packages = ("jax", "jaxlib", "torch", "transformers")
        keep(f"sampler-{device}", {"cpu_ms_a_batch": figures, **machine(packages)})
    sys.exit(int(missed))


if __name__ == "__main__":
    main()
