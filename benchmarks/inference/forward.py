"""A forward pass to the logits against transformers, on the same weights and tokens.

    python -m benchmarks.inference.forward                     (CPU, float32, a small Mixtral; a minute)

Named peer: transformers' Mixtral with the fastest of its implementations of the experts that this machine can hold
(`grouped_mm` is its default, `eager` the other; `batched_mm` copies a matrix for every row of every expert, 4 GB at
this size). Each runs in a process of its own and they compute in turn. Limits: tokens per second 1.3 times the peer's;
the logits agree. On a machine that does other work as well go by the ratio of CPU time.

The limit of speed is not reached. Of 0.85 to 0.9 s a pass on two cores, of which 0.64 are its products at the rate of
a large one (2 x 100e9 a second), the head takes 0.43 (with the first touch of 262 MB of logits), attention's
projections 0.17, the experts 0.16, attention's core 0.12; the head is the same work for both sides. Tried in vain:
huge pages, other steps along the queries, tokens in two halves as loops of their own, masks as biases.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lib.results import add_keep, keep, machine
from benchmarks.lib.sides import Step, Worker, serve
from benchmarks.train.train_step import PACKAGES, model_config

SPEED_LIMIT, AGREEMENT = 1.3, 1e-4
PEERS = ("grouped_mm", "eager")
WARM_UP = 2


def prepare(directory: Path, options: argparse.Namespace) -> None:
    """Writes a model and tokens."""
    import jax
    import numpy as np

    from nemoe_jax.checkpoints import pretrained
    from nemoe_jax.spec import schema

    config = model_config("cpu", options.vocab)
    pretrained.save_pretrained(directory / "model", config, schema.initialize(config, jax.random.key(0), config.dtype))
    tokens = np.random.default_rng(0).integers(0, config.vocab, (options.rows, options.length))
    np.save(directory / "tokens.npy", tokens.astype(np.int32))


def ours(directory: Path) -> tuple[Step, Callable[[], dict[str, Any]]]:
    """Our pass; and some of its logits."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nemoe_jax.checkpoints import pretrained
    from nemoe_jax.model import transformer

    config, params = pretrained.load_pretrained(directory / "model")
    tokens = jnp.asarray(np.load(directory / "tokens.npy"))
    forward = jax.jit(lambda params, tokens: transformer.forward(config, params, tokens).logits)

    def step() -> float:
        return float(forward(params, tokens).block_until_ready()[0, -1, 0])

    return step, lambda: {"logits": np.asarray(forward(params, tokens)[:, -1, :100]).ravel().tolist()}


def peer(directory: Path, experts: str) -> tuple[Step, Callable[[], dict[str, Any]]]:
    """The pass of transformers; and some of its logits."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype="auto", experts_implementation=experts)
    tokens = torch.from_numpy(np.load(directory / "tokens.npy")).long()

    def logits() -> Any:
        with torch.inference_mode():
            return model(input_ids=tokens, use_cache=False).logits.float()

    return lambda: logits()[0, -1, 0].item(), lambda: {"logits": logits()[:, -1, :100].flatten().tolist()}


def measure(directory: Path, options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """All sides' passes, in turn."""
    workers = {name: Worker(name, directory, arguments, __spec__.name) for name in ("ours", *PEERS)}
    sides: dict[str, dict[str, Any]] = {name: {"passes": []} for name in workers}
    for number in range(WARM_UP + options.passes):
        for name, worker in workers.items():
            one = worker.ask("step")
            if number >= WARM_UP:
                sides[name]["passes"].append(one)
    samples = {name: worker.ask("facts")["logits"] for name, worker in workers.items()}
    for name, worker in workers.items():
        assert worker.process.stdin
        worker.process.stdin.close()
        worker.process.wait()
        side = sides[name]
        side["seconds"] = statistics.median(one["seconds"] for one in side["passes"])
        side["cpu_seconds"] = statistics.median(one["cpu"] for one in side["passes"])
        side["tokens_per_second"] = options.rows * options.length / side["seconds"]
        side["logits_differ_by"] = max(abs(a - b) for a, b in zip(samples[name], samples["ours"], strict=True))
    best = min(PEERS, key=lambda name: sides[name]["seconds"])
    return {
        **sides,
        "peer": best,
        "ratio": sides["ours"]["tokens_per_second"] / sides[best]["tokens_per_second"],
        "cpu_ratio": min(sides[name]["cpu_seconds"] for name in PEERS) / sides["ours"]["cpu_seconds"],
    }


def main() -> None:
    """Prepares, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=7, help="timed passes of each, after two to warm up; default: 7")
    parser.add_argument("--rows", type=int, default=4, help="rows of tokens; default: 4")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row; default: 512")
    parser.add_argument("--vocab", type=int, default=32000, help="vocabulary of the model; default: 32000")
    add_keep(parser)
    parser.add_argument("--role", choices=("prepare", "ours", *PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "prepare":
        return prepare(options.directory, options)
    if options.role:
        return serve(*(ours(options.directory) if options.role == "ours" else peer(options.directory, options.role)))
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return print(f"skipped: {name} is not installed")
    arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        if Worker("prepare", Path(name), arguments, __spec__.name).process.wait():
            raise SystemExit("the model could not be written")
        figures = {**measure(Path(name), options, arguments), **machine(PACKAGES)}
    figures["options"] = {key: getattr(options, key) for key in ("rows", "length", "vocab", "passes")}
    for name in ("ours", *PEERS):
        side = figures[name]
        label = name if name == "ours" else f"transformers, experts {name}"
        print(f"{label}: {side['tokens_per_second']:.0f} tokens/s, {side['seconds']:.3f} s a pass", end=", ")
        print(f"{side['cpu_seconds']:.3f} s of CPU time; logits differ by {side['logits_differ_by']:.1e}")
    print(f"{figures['machine']}, {figures['cores']} cores, {figures['versions']}")
    print(f"ratio to {figures['peer']} {figures['ratio']:.2f} (limit {SPEED_LIMIT})", end=", ")
    print(f"of CPU time to the thriftiest {figures['cpu_ratio']:.2f}")
    if options.keep:
        keep("forward-cpu", figures)
    wrong = any(figures[name]["logits_differ_by"] > AGREEMENT for name in PEERS)
    sys.exit(wrong or figures["ratio"] < SPEED_LIMIT)


if __name__ == "__main__":
    main()
