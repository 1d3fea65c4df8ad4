"""An NVIDIA H200 to compile for, on a machine that has none.

JAX's plugin for CUDA compiles for a card by its description alone. What asks the card itself is left out or answered
here: measuring which of several kernels is fastest (autotuning), and the version of cuDNN.
"""

import functools
import importlib.util
import os
from typing import Any

# Bytes that JAX takes of a card's memory: three quarters, unless told otherwise (docs.jax.dev, GPU memory allocation)
USABLE = 151397597184 * 3 // 4
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


def missing() -> str | None:
    """Why it cannot be compiled for: a line to print."""
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in ("12", "13")):
        return None
    return "skipped: jax-cuda12-plugin is not installed"


@functools.cache
def absent_h200() -> Any:
    """The card, as a device that programs may be compiled for; to be called before JAX has a backend."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"  # there is nothing to tune on
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    import jax
    from jax._src.cudnn import fused_attention_stablehlo
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # where JAX was imported before
    fused_attention_stablehlo.check_cudnn_version = lambda: 91000
    card = topologies.get_topology_desc(platform="cuda", topology_name="h200", target_config=CARD, topology="1x1x1")
    return card.devices[0]
