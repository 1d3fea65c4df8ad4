#!/usr/bin/env bash
# jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.52
#
# A product of one row with a matrix, as in decoding one sequence, is compiled for TPUs into a multiplication element by
# element and a sum, on the vector unit. Two rows go to the matrix unit, at a third of the cycles, although the weights
# that both read are the same. A second row of zeros does.
#
# Seen (v5e, 40 layers of 4096x4096 in bfloat16, estimated cycles of a layer's product): one row 235,024; two 86,034, as
# eight; 128 rows 94,064; one row and a row of zeros 86,034.
#
# Why it matters: decoding a single sequence takes several times what reading its weights does.
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

LAYERS, WIDTH = 40, 4096
device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]  # that need not be there


def look(title, rows, zeros=False):
    def layer(x, w):
        given = jnp.concatenate([x, jnp.zeros_like(x)]) if zeros else x
        return jnp.tanh((given @ w)[:rows]), None

    x, stack = (
        jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=SingleDeviceSharding(device))
        for sizes in ((rows, WIDTH), (LAYERS, WIDTH, WIDTH))
    )
    text = jax.jit(lambda x, stack: jax.lax.scan(layer, x, stack)[0]).lower(x, stack).compile().as_text()
    cycles = max(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
    is_product = re.search(r" (convolution|dot)\(", text) is not None
    print(f"{title}: {cycles} cycles, {'matrix' if is_product else 'vector'} unit")
    return cycles, is_product


one, two = look("one row", 1), look("two rows", 2)
look("128 rows", 128)
padded = look("one row and a row of zeros", 1, zeros=True)
assert not one[1] and two[1], "one row and two are compiled alike now"
assert one[0] > 2 * two[0], "one row costs no more than two now"
assert padded == two, "a row of zeros is treated otherwise now"
PY
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5e-8 TPU_WORKER_HOSTNAMES=localhost \
    "$work/venv/bin/python" "$work/look.py"
