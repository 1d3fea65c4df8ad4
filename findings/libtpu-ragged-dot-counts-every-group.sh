#!/usr/bin/env bash
# jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.52
#
# For TPUs `jax.lax.ragged_dot` is compiled into a fusion that skips the tiles of other groups, but its text, its
# `cost_analysis()["flops"]` and its `estimated_cycles` are those of all rows times the matrix of every group. Only
# `"is_ragged_dot":true,"num_groups_in_ragged_dot"` in the fusion's backend_config tells.
#
# Seen (v5e, 16384x5120 rows by 5120x896 in bfloat16, 150.3 GFLOPs needed, a plain product 1.19 million cycles):
#     1 group   150.3 GFLOPs     4.96 million cycles
#     4 groups  601.4 GFLOPs    23.6
#    16 groups  2405.6 GFLOPs  145.2, 122 times the plain product
#
# Why it matters: of a MoE's step both figures are many times too large, and say that a ragged dot were hopeless. Divided
# by the groups FLOPs are right; cycles are still 4 to 8 times those of a plain product of the same rows, so that the
# compiler expects this operation to be slow even where nothing is skipped. A Pallas kernel carries no estimate at all.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.52 numpy==2.3.5
cat > "$work/look.py" <<'PY'
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

ROWS, IN, OUT = 16384, 5120, 896
device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]  # that need not be there


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(device))


def figures(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    text = compiled.as_text()
    cycles = re.findall(r'"estimated_cycles":"(\d+)"', text[text.index("\nENTRY") :])
    return compiled.cost_analysis()["flops"], sum(map(int, cycles)), text


def ragged(x, w, sizes):
    return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.bfloat16)


flops, cycles, _ = figures(lambda x, w: x @ w, shape(ROWS, IN), shape(IN, OUT))
print(f"plain product: {flops / 1e9:.1f} GFLOPs, {cycles / 1e6:.2f} million cycles")
for groups in (1, 4, 16):
    arguments = shape(ROWS, IN), shape(groups, IN, OUT), shape(groups, dtype=jnp.int32)
    counted, expected, text = figures(ragged, *arguments)
    print(f"{groups} groups: {counted / 1e9:.1f} GFLOPs, {expected / 1e6:.2f} million cycles, {expected / cycles:.1f} x")
    assert f'"is_ragged_dot":true,"num_groups_in_ragged_dot":"{groups}"' in text, "a ragged dot is written otherwise now"
    assert round(counted / flops) == groups, "only a row's own group counts now"
    assert expected > 3 * groups * cycles, "cycles are estimated otherwise now"
PY
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5e-8 TPU_WORKER_HOSTNAMES=localhost \
    "$work/venv/bin/python" "$work/look.py"
