"""What the number of experts costs at the same active neurons: models of 4 to 128 experts beside a dense one.

    python -m benchmarks.inference.expert_count            (CPU, float32; three minutes)
    python -m benchmarks.inference.expert_count --tpu      (layers of the 12B, bfloat16, compiled for a v5e; libtpu)

Named peer: a dense model with as many neurons as a token uses of the others, which is what layers cost that route
nothing. All have two layers, random weights and a quarter of their neurons active. They take turns; the median of the
CPU time counts. A carve by token clusters is one function for any number of experts: this says into how many to cut.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.lib.results import add_keep, keep, machine

EXPERTS = (0, 4, 16, 64, 128)  # 0: the dense model
NEW = 33
AIM = 1.25  # times the dense model's prefill, with 16 experts


def main() -> None:
    """Prints a table of CPU times, or of the compiler's memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1536, help="width on CPU (default 1536)")
    parser.add_argument("--ffn", type=int, default=4096, help="neurons of all experts of a layer (default 4096)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tpu", action="store_true", help="compile for a v5e instead; nothing is run")
    add_keep(parser)
    options = parser.parse_args()
    if options.tpu:
        return on_tpu()
    sys.exit(not on_cpu(options))


def model(hidden: int, ffn: int, experts: int, dtype: str) -> Any:
    """Two layers; 0 experts: dense, of a quarter of the neurons."""
    from nemoe_jax.spec.config import ModelConfig

    kind: dict[str, Any] = {"family": "mistral", "ffn": ffn // 4}
    if experts:
        kind = {"family": "mixtral", "experts": experts, "top_k": experts // 4, "expert_ffn": ffn // experts}
    heads = {"heads": hidden // 128, "kv_heads": hidden // 512, "head_dim": 128}
    return ModelConfig(hidden=hidden, layers=2, vocab=512, context=40960, dtype=dtype, **heads, **kind)


def on_cpu(options: argparse.Namespace) -> bool:
    """Times the models in turn."""
    import jax
    import numpy as np

    from nemoe_jax.inference.generate import generate
    from nemoe_jax.model.transformer import forward
    from nemoe_jax.spec.schema import initialize

    def decoding(config: Any, params: Any, batch: int) -> Callable[[], float]:
        prompts = np.random.default_rng(0).integers(1, config.vocab, (batch, 16)).tolist()

        def run() -> float:
            tokens = generate(config, params, prompts, NEW)
            next(tokens)
            started = time.process_time()
            return (sum(1 for _ in tokens) and time.process_time() - started) / (NEW - 1)

        return run

    def prefill(config: Any, params: Any) -> Callable[[], float]:
        tokens = np.random.default_rng(0).integers(1, config.vocab, (1, 512))
        step = jax.jit(lambda params: forward(config, params, tokens).logits)

        def run() -> float:
            started = time.process_time()
            step(params).block_until_ready()
            return time.process_time() - started

        return run

    work: dict[tuple[int, str], Callable[[], float]] = {}
    for experts in EXPERTS:
        config = model(options.hidden, options.ffn, experts, "float32")
        params = initialize(config, jax.random.key(0))
        work[experts, "decode, batch 1"] = decoding(config, params, 1)
        work[experts, "decode, batch 8"] = decoding(config, params, 8)
        work[experts, "prefill, 512 tokens"] = prefill(config, params)
    times: dict[tuple[int, str], list[float]] = {key: [] for key in work}
    for turn in range(options.rounds + 1):
        for key, run in work.items():
            seconds = run()
            if turn:  # the first compiles
                times[key].append(seconds)
    names = list(dict.fromkeys(name for _, name in work))
    print(f"{options.hidden} x {options.ffn}, two layers, a quarter of the neurons active: CPU ms; x the dense model")
    print(f"{'experts':>8}" + "".join(f"{name:>24}" for name in names))
    ratios: dict[str, dict[str, float]] = {}
    for experts in EXPERTS:
        medians = {name: statistics.median(times[experts, name]) for name in names}
        ratios[str(experts)] = {name: medians[name] / statistics.median(times[0, name]) for name in names}
        row = (f"{1e3 * medians[name]:14.1f} ms{ratios[str(experts)][name]:6.2f}x" for name in names)
        print(f"{experts or 'dense':>8}" + "".join(row))
    if options.keep:
        keep("expert_count-cpu", machine() | {"ratios": ratios})
    return ratios["16"][names[-1]] <= AIM


def on_tpu() -> None:
    """Compiles two layers of the 12B for a v5e chip."""
    if importlib.util.find_spec("libtpu") is None:
        return print("skipped: libtpu, the TPU compiler, is not installed: pip install 'nemoe-jax[tpu]'")
    from train.plan.plan import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    import jax

    from benchmarks.hardware import tpu
    from nemoe_jax.spec.mesh import make_mesh
    from train.plan import aot

    mesh = make_mesh({"tensor": 1}, aot.topology_devices("v5e:2x2")[:1])
    work = {"decode, batch 8": tpu.Work(8, 1024, "bfloat16"), "prefill, 2048 tokens": tpu.Work(1, 2048)}
    print("5120 x 14336, two layers, bfloat16, one v5e chip: MB of temporaries")
    print(f"{'experts':>8}" + "".join(f"{name:>24}" for name in work))
    for experts in EXPERTS:
        print(f"{experts or 'dense':>8}", end="", flush=True)
        for one in work.values():
            with jax.set_mesh(mesh):
                lowered, _ = tpu.lower(model(5120, 14336, experts, "bfloat16"), mesh, one)
            print(f"{lowered.compile().memory_analysis().temp_size_in_bytes / 1e6:24.1f}", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
