#!/usr/bin/env bash
# jax 0.10.2, jaxlib 0.10.2
#
# `jax.lax.ragged_dot` multiplies each row with one group's matrix, so its cost should not depend on the number of
# groups. On CPU it is lowered to a dense product over all groups, with masked rows: FLOPs and scratch memory grow with
# the number of experts.
#
# Seen (512 rows, 128 to 256, groups of equal size): executed over needed FLOPs 1.0, 4.0, 16.1 and 64.5 for 1, 4, 16
# and 64 groups, scratch 0.3, 1.6, 6.3 and 25.2 MB.
#
# Why it matters: an MoE model with few active experts is no faster than one that uses all, on CPU, and a test that counts
# FLOPs there says nothing about other devices.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat > "$work/look.py" <<'PY'
import jax
import jax.numpy as jnp

rows, inputs, outputs = 512, 128, 256
for groups in (1, 4, 16, 64):
    sizes = jnp.full(groups, rows // groups, jnp.int32)
    program = jax.jit(jax.lax.ragged_dot).lower(
        jnp.ones((rows, inputs)), jnp.ones((groups, inputs, outputs)), sizes
    ).compile()
    ratio = program.cost_analysis()["flops"] / (2 * rows * inputs * outputs)
    scratch = program.memory_analysis().temp_size_in_bytes / 1e6
    print(f"{groups} groups: {ratio:.1f} times the FLOPs needed, {scratch:.1f} MB of scratch")
    assert groups <= ratio < 1.1 * groups, "ragged_dot on CPU is no longer dense"
PY
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/look.py"
