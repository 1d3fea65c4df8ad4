#!/usr/bin/env bash
# torch 2.13.0, jax 0.10.2
#
# Of equal values `jax.lax.top_k` takes those of the lowest index, which its documentation promises. `torch.topk` takes
# others on CPU, and which depends on the number of values.
#
# Seen (the top 2 of all-equal values): JAX 0, 1 always; torch 6, 5 of 8; 10, 11 of 16; 22, 21 of 32; 42, 43 of 64;
# 0, 1 of 128.
#
# Why it matters: experts that are copies of one another, routers that start at zero and logits rounded to 16 bits do
# have ties. The same weights then use other experts in the two libraries, and logits differ by far more than rounding.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat > "$work/look.py" <<'PY'
import jax
import jax.numpy as jnp
import torch

differ = 0
for experts in (8, 16, 32, 64, 128):
    ours = jax.lax.top_k(jnp.zeros((1, experts)), 2)[1][0].tolist()
    theirs = torch.topk(torch.zeros(1, experts), 2)[1][0].tolist()
    print(f"top 2 of {experts} equal values: jax {ours}, torch {theirs}")
    assert ours == [0, 1], "jax takes others now"
    differ += sorted(theirs) != ours
assert differ, "torch takes the lowest index now"
PY
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/look.py"
