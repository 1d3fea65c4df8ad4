"""NVIDIA cards to compile for, on a machine that has none.

JAX's plugin for CUDA compiles for a card by its description alone. What asks the card itself is left out or answered
here: measuring which of several kernels is fastest (autotuning), and the version of cuDNN.
"""

import functools
import importlib.metadata
import importlib.util
import os
from typing import Any, NamedTuple

from nemoe_jax.errors import UserError


class Card(NamedTuple):
    """What XLA wants to know of a card. Its own list has more, which changes estimates alone."""

    kind: str
    memory: int  # bytes
    bandwidth: int  # bytes per second
    capability: str
    cores: int  # streaming multiprocessors
    clock_ghz: float
    l2_cache: int  # bytes
    shared_memory: int  # bytes of a core; a block gets 1024 less
    threads: int  # of a core


SHARES = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # the newer name first
_HOPPER = ("major: 9 feature_extension: ACCELERATED_FEATURES", 132, 1.98, 50 * 2**20, 228 * 2**10, 2048)
CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", 84929347584, 3352320000000, *_HOPPER),
    "h200": Card("NVIDIA H200", 151397597184, 4800000000000, *_HOPPER),
    "rtx4090": Card(
        "NVIDIA GeForce RTX 4090",
        24564 * 2**20,
        1008 * 10**9,
        "major: 8 minor: 9",
        128,
        2.52,
        72 * 2**20,
        100 * 2**10,
        1536,
    ),
}
_DESCRIPTION = """
gpu_device_info {{
  name: "{kind}" cuda_compute_capability {{ {capability} }}
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: {clock_ghz} threads_per_warp: 32
  memory_bandwidth: {bandwidth} device_memory_size: {memory} l2_cache_size: {l2_cache}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {of_block} shared_memory_per_core: {shared_memory}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_block_limit: 1024 threads_per_core_limit: {threads}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""


def missing() -> str | None:
    """Why no card can be compiled for: a line to print."""
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in ("12", "13")):
        return None
    version = importlib.metadata.version("jax")
    wanted = f"'jax-cuda12-plugin[with-cuda]=={version}' jax-cuda12-pjrt=={version}"
    return f"jax-cuda12-plugin is not installed: pip install {wanted}"


def usable_bytes(kind: str) -> int | None:
    """Bytes that JAX takes of a card's memory: three quarters, or the share in one of `SHARES`.

    Source: docs.jax.dev, GPU memory allocation.

    Raises:
        UserError: what stands there is no share.
    """
    name, words = next(((name, os.environ[name]) for name in SHARES if os.environ.get(name)), ("", "0.75"))
    try:
        share = float(words)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"{name}: expected a share of the card's memory, above 0 and up to 1, got {words}")
    return next((int(card.memory * share) for card in CARDS.values() if card.kind == kind), None)


@functools.cache
def absent_gpus(name: str, count: int = 1) -> list[Any]:
    """So many cards of one machine, as devices that programs may be compiled for; before JAX has a backend.

    Raises:
        UserError: JAX's plugin for CUDA is not installed.
    """
    if reason := missing():
        raise UserError(f"{name}: {reason}")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"  # there is nothing to tune on
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    import jax
    from jax._src.cudnn import fused_attention_stablehlo
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # where JAX was imported before
    fused_attention_stablehlo.check_cudnn_version = lambda: 91000
    card = CARDS[name]
    config = _DESCRIPTION.format(**card._asdict(), of_block=card.shared_memory - 1024)
    shape = f"1x1x{count}"
    return list(
        topologies.get_topology_desc(platform="cuda", topology_name=name, target_config=config, topology=shape).devices
    )
