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
import importlib.util
import os
import re
import sys
from typing import Any
from unittest import mock

from benchmarks.lib.results import add_keep, keep, machine

WASTE, DECODE_BYTES, FORWARD_BYTES = 1.15, 100e6, 2e9
SLOTS = 704  # of the cache: 512 tokens of a prompt and some
# What XLA wants to know of the card. Its own list has more, which changes estimates alone.
CARD = """
gpu_device_info {
  name: "NVIDIA H200" cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  memory_bandwidth: 4800000000000 device_memory_size: 151397597184 l2_cache_size: 52428800
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


def compiled() -> dict[str, Any]:
    """The forward pass and the decoding step."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from nemoe_jax.inference.generate import _decode, _start
    from nemoe_jax.inference.sampler import controls
    from nemoe_jax.inference.sampling import SamplingParams
    from nemoe_jax.model.transformer import hidden_states, logits
    from nemoe_jax.spec import schema
    from nemoe_jax.spec.config import preset

    card = topologies.get_topology_desc(platform="cuda", topology_name="h200", target_config=CARD, topology="1x1x1")
    mesh = jax.sharding.Mesh([card.devices[0]], ("data",))
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
    plugin = next((name for name in ("12", "13") if importlib.util.find_spec(f"jax_cuda{name}_plugin")), None)
    if plugin is None:
        return print("skipped: jax-cuda12-plugin is not installed")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"  # there is nothing to tune on
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    from jax._src.cudnn import fused_attention_stablehlo

    from nemoe_jax.kernels.grouped_matmul.gpu import row_blocks, tiles_at_most

    with mock.patch.object(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000):  # asks the card's driver
        programs = compiled()
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
