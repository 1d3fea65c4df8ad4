#!/usr/bin/env bash
# jax 0.10.2, jaxlib 0.10.2
#
# `compiled.cost_analysis()["flops"]` counts the body of a loop once, though the number of iterations is a constant of
# the program. A model whose layers run in `lax.scan` seems to cost one layer; with `unroll=2`, two.
#
# Seen (8 layers of a 32x64 by 64x64 product, 2,097,152 FLOPs in all): 262,146 with scan, 524,290 with unroll=2,
# 2,097,152 for the same layers written out.
#
# Why it matters: utilisation (MFU), a plan of a training step or a ratio of executed over needed FLOPs that is taken
# from there is wrong by the number of layers. Trip counts have to be multiplied in from the program's text.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat > "$work/look.py" <<'PY'
import jax
import jax.numpy as jnp

LAYERS, ROWS, WIDTH = 8, 32, 64


def scanned(unroll):
    def run(x, weights):
        return jax.lax.scan(lambda carry, weight: (jnp.tanh(carry @ weight), None), x, weights, unroll=unroll)[0]

    return run


def written_out(x, weights):
    for layer in range(LAYERS):
        x = jnp.tanh(x @ weights[layer])
    return x


def flops(function):
    program = jax.jit(function).lower(jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))).compile()
    return program.cost_analysis()["flops"]


layer = 2 * ROWS * WIDTH * WIDTH
counts = {"scan": flops(scanned(1)), "scan, unroll=2": flops(scanned(2)), "written out": flops(written_out)}
for name, count in counts.items():
    print(f"{name}: {count:,.0f} FLOPs, {count / layer:.2f} layers of {LAYERS}")
assert [round(count / layer) for count in counts.values()] == [1, 2, LAYERS], "loops are counted otherwise now"
PY
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/look.py"
