#!/usr/bin/env bash
# jax 0.10.2, jaxlib 0.10.2, jax-cuda12-plugin 0.10.2, compiled for an H200 that is not there
#
# XLA for NVIDIA's Hopper lays out both sides of a float8 product so that what is summed over is last. Where the weights
# are sliced out of a stack in a loop, as in a scan over layers, that reaches the stack itself: before the loop all layers
# are transposed into a copy. bfloat16 has no such copy. `with_layout_constraint` on the slice keeps the stack as it is,
# and the product transposes as it reads; but over several cards it makes the partitioner gather the slice first.
#
# Seen (16 layers of 1024x1024, 16.8 MB in float8; 512 rows): temporaries 25.7 MB in float8, 8.9 with the constraint,
# 10.5 in bfloat16. With the columns cut over two cards, whole matrices are gathered only with the constraint.
#
# Why it matters: the copy is made in every call and is as large as the model, so that weights in FP8 save no memory
# while a prompt is read.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
"$work/venv/bin/pip" install --quiet --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cuda-nvcc-cu12==12.9.86
cat > "$work/look.py" <<'PY'
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LAYERS, IN, OUT, ROWS = 16, 1024, 1024, 512
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
cards = topologies.get_topology_desc(
    platform="cuda", topology_name="h200", target_config=CARD, topology="1x1x2"
).devices  # that need not be there


def compiled(dtype, held, cards):
    mesh = Mesh(cards, ("tensor",))

    def shape(sizes, dtype, *axes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def layers(x, w):
        def layer(x, w):
            w = with_layout_constraint(w, Layout((0, 1))) if held else w
            return jnp.dot(x.astype(dtype), w, preferred_element_type=jnp.float32).astype(jnp.bfloat16), None

        return jax.lax.scan(layer, x, w)[0]

    x, w = shape((ROWS, IN), jnp.bfloat16), shape((LAYERS, IN, OUT), dtype, None, None, "tensor")
    return jax.jit(layers).lower(x, w).compile()


def temporaries(*arguments):
    return compiled(*arguments, cards[:1]).memory_analysis().temp_size_in_bytes


stack = LAYERS * IN * OUT
wide = temporaries(jnp.bfloat16, False)
narrow, held = (temporaries("float8_e4m3fn", way) for way in (False, True))
print(f"temporaries, MB: bfloat16 {wide / 1e6:.1f}, float8 {narrow / 1e6:.1f}, held as stored {held / 1e6:.1f}")
assert narrow > stack > max(held, wide), "float8 weights are not laid out anew any more, or always"
pattern = rf"f8e4m3fn\[{IN},{OUT}\]\S*\) all-gather-start"
free, fixed = (bool(re.search(pattern, compiled("float8_e4m3fn", way, cards).as_text())) for way in (False, True))
print(f"whole matrices are gathered where they are cut over two cards: {free}, held as stored: {fixed}")
assert fixed and not free, "a layout is no reason to gather weights any more"
PY
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_autotune_level=0 "$work/venv/bin/python" "$work/look.py" 2> "$work/errors" ||
    { cat "$work/errors" >&2; exit 1; }
