"""FLOPs of a compiled MoE layer over those that its mathematics needs: forward, and with one and with both gradients.

    python -m benchmarks.inference.moe_flops                   (CPU; ten seconds)

The layer is that of the other benchmarks: 16 experts, top-4, hidden 512, expert FFN 128, 4 x 512 tokens, with its
router. Named limit: the ideal, T · (C · 3 · D · F + D · E) multiplications forward and as many for each gradient (of
the layer's input, of its weights), to be exceeded by 15 % at most.

The products are read from the compiled program. The loops over the experts' tiles have trip counts that depend on the
routing, so their bodies count by the rows that the tiles have for a given routing: each expert's own, rounded up to
whole small tiles. "worst" is the routing with the most waste: a single row in every expert's last tile.

T tokens, C top-k, D hidden, F expert FFN, E experts.
"""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lib.results import add_keep, keep, machine
from benchmarks.train.train_step import executed_flops, model_config
from nemoe_jax.kernels.grouped_matmul.cpu import tile_rows
from train.plan import hlo

LIMIT = 1.15
ROWS, LENGTH = 4, 512


def programs(config: Any) -> dict[str, tuple[str, int]]:
    """The layer compiled: {what it computes: (the program's text, how many times the forward pass's products)}."""
    from flax import nnx

    from nemoe_jax.model.moe import MoE
    from nemoe_jax.spec import schema

    specs = schema.declare(config)["blocks"]["moe"]["ffn"]
    graph = nnx.split(nnx.eval_shape(lambda: MoE(config, specs)))[0]
    weights = {name: jax.ShapeDtypeStruct(spec.shape[1:], jnp.float32) for name, spec in specs.items()}
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, config.hidden), jnp.float32)

    def layer(weights: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, weights)(x)[0]

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(layer(weights, x) ** 2)

    phases = {
        "forward": (layer, 1),
        "forward and gradient of the input": (jax.grad(loss, 1), 2),
        "forward and both gradients": (jax.grad(loss, (0, 1)), 3),
    }
    return {name: (jax.jit(of).lower(weights, x).compile().as_text(), times) for name, (of, times) in phases.items()}


def routings(config: Any) -> dict[str, np.ndarray]:
    """Rows of each expert, by name of the routing."""
    tokens, random = ROWS * LENGTH, np.random.default_rng(0)
    scores = random.normal(size=(tokens, config.experts)) + 0.3 * random.normal(size=config.experts)
    drawn = np.bincount(np.argsort(-scores)[:, : config.top_k].ravel(), minlength=config.experts)
    rows = tokens * config.top_k
    even = np.full(config.experts, rows // config.experts)
    tile = tile_rows(rows, config.experts)
    worst = even // tile * tile + 1  # the last expert takes what is left
    worst[-1] += rows - worst.sum()
    return {"even": even, "drawn": drawn, "worst": worst}


def main() -> None:
    """Compiles, counts, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_keep(parser)
    options = parser.parse_args()
    device = jax.default_backend()
    if device != "cpu":
        return print(f"skipped: on {device} the experts' products are in kernels, whose FLOPs the program does not say")
    config = model_config("cpu", 512)
    tokens = ROWS * LENGTH
    ideal = 2 * tokens * config.hidden * (3 * config.top_k * config.expert_ffn + config.experts)
    small = tile_rows(tokens * config.top_k, config.experts)
    figures: dict[str, Any] = {"ideal_forward_flops": ideal, "limit": LIMIT, "ratios": {}}
    cases = routings(config)
    print(f"{'executed over ideal FLOPs':36}" + "".join(f"{name:>8}" for name in cases) + f"   (limit {LIMIT})")
    for name, (text, times) in programs(config).items():
        ratios = {}
        for routing, sizes in cases.items():
            filled = int((-(-sizes // small) * small).sum())
            ratios[routing] = executed_flops(hlo.parse(text), config, tokens, filled) / (times * ideal)
        figures["ratios"][name] = ratios
        print(f"{name:36}" + "".join(f"{ratio:8.3f}" for ratio in ratios.values()))
    print("GPU, TPU: skipped: their kernels' FLOPs are not in the program (benchmarks.hardware.gpu says what they do)")
    if options.keep:
        keep(f"moe_flops-{device}", figures | machine())
    sys.exit(any(ratio > LIMIT for ratios in figures["ratios"].values() for ratio in ratios.values()))


if __name__ == "__main__":
    main()
