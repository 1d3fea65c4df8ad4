"""The 12B with 16 experts compiled for an NVIDIA H200 on a machine that has none: memory, kernels, wasted products.

    pip install --target /tmp/gpu 'jax-cuda12-plugin[with-cuda]==0.10.2' jax-cuda12-pjrt==0.10.2
    PYTHONPATH=/tmp/gpu python -m benchmarks.hardware.gpu_compile

Nothing is run and nothing is tuned, so this says that it compiles, what it holds, and of how many kernels a layer is
made; not how fast it is. Limits: products with the rows of the experts' last tiles, 1.15 times those that are needed
for 8192 tokens; memory beside arguments and results, 100 MB for a decoding step, which leaves no room for a copy of a
layer's experts, and 2 GB for a forward pass of 4 x 2048 tokens.
"""

import argparse
import collections
import re
import sys
from typing import Any

from benchmarks.lib.results import add_keep, keep, machine
from train.plan.absent_gpu import absent_gpus, missing

WASTE, DECODE_BYTES, FORWARD_BYTES = 1.15, 100e6, 2e9
SLOTS = 704  # of the cache: 512 tokens of a prompt and some


def compiled(card: Any) -> dict[str, Any]:
    """The forward pass and the decoding step."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nemoe_jax.inference.generate import _decode, _start
    from nemoe_jax.inference.sampler import controls
    from nemoe_jax.inference.sampling import SamplingParams
    from nemoe_jax.model.transformer import hidden_states, logits
    from nemoe_jax.spec import schema
    from nemoe_jax.spec.config import preset

    mesh = jax.sharding.Mesh([card], ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(tree: Any, dtype: Any = None) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=place), tree)

    config = preset("nemoe-12b-16e")
    params = placed(jax.eval_shape(lambda: schema.initialize(config, jax.random.key(0))), jnp.bfloat16)

    def forward(params, tokens_BT):
        return logits(config, params, hidden_states(config, params, tokens_BT).x_BTD[:, -1:])

    with jax.set_mesh(mesh):
        tokens_BT = placed(jax.ShapeDtypeStruct((4, 2048), jnp.int32))
        stop_E = np.array([-1], np.int32)
        state, _ = placed(jax.eval_shape(lambda: _start(config, (SLOTS,), jnp.dtype("bfloat16"), False, 1, stop_E)))
        steps, inputs = placed((np.int32(0), controls([SamplingParams()], config.vocab)))
        return {
            "forward": jax.jit(forward).lower(params, tokens_BT).compile(),
            "decode": _decode.lower(config, params, state, steps, inputs).compile(),
        }


def kernels_of_a_layer(program: str) -> int:
    """Of the body of the loop over the layers: the largest computation that is no fusion and not the whole."""
    counts: collections.Counter[str] = collections.Counter()
    name = ""
    for line in program.splitlines():
        if re.match(r"(ENTRY )?%\S+ \(", line):
            name = line.split()[0]
        elif re.search(r" (fusion|custom-call|sort|copy|dot|convolution)\(", line) and name.startswith("%region"):
            counts[name] += 1
    return max(counts.values(), default=0)


def main() -> None:
    """Compiles both and prints what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_keep(parser)
    options = parser.parse_args()
    if reason := missing():
        return print(f"skipped: {reason}")
    from nemoe_jax.kernels.grouped_matmul.gpu import row_blocks, tiles_at_most

    programs = compiled(absent_gpus("h200")[0])
    rows, experts = 4 * 8192, 16
    tile = row_blocks(rows, experts, "bfloat16").rows
    figures: dict[str, Any] = {"waste": tiles_at_most(rows, experts, tile) * tile / rows}
    limits = {"waste": WASTE, "forward": FORWARD_BYTES, "decode": DECODE_BYTES}
    print(f"products over those needed, 8192 tokens: {figures['waste']:.3f} at most (limit {WASTE})")
    for name, program in programs.items():
        memory, text = program.memory_analysis(), program.as_text()
        figures[name] = memory.temp_size_in_bytes
        figures[f"{name}_kernels_of_a_layer"] = kernels = kernels_of_a_layer(text)
        print(f"{name}: {memory.argument_size_in_bytes / 1e9:.1f} GB of arguments, beside them ", end="")
        print(f"{figures[name] / 1e6:.1f} MB (limit {limits[name] / 1e6:.0f}), {kernels} kernels a layer")
    if options.keep:
        keep("gpu_compile-h200", {**machine(), **figures, "limits": limits})
    sys.exit(any(figures[name] > limit for name, limit in limits.items()))


if __name__ == "__main__":
    main()
