#!/usr/bin/env bash
# optax 0.2.8, jax 0.10.2
#
# `optax.global_norm`, and with it `clip_by_global_norm`, adds the arrays' sums of squares one after another in the
# arrays' own dtype. In a tree of many bfloat16 arrays the running sum soon stops growing.
#
# Seen (bfloat16 arrays that all hold 0.01): 2000 arrays of 10 have the norm 0.7070 instead of 1.4156, 200 arrays of
# 1000 have 4.75 instead of 4.4765. One array of 20000 numbers has the right one to three digits.
#
# Why it matters: models with an array for each expert or adapter have thousands of leaves. Their gradient seems half as
# long as it is, so clipping lets through twice the limit, and what is logged depends on how weights are stacked.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat > "$work/look.py" <<'PY'
import jax.numpy as jnp
import optax

value = jnp.bfloat16(0.01)
ratios = []
for arrays, size in ((1, 20000), (200, 1000), (2000, 10)):
    tree = [jnp.full(size, value)] * arrays
    norm, exact = float(optax.global_norm(tree)), (arrays * size) ** 0.5 * float(value)
    ratios.append(norm / exact)
    print(f"{arrays} arrays of {size}: {norm:.4f}, exactly {exact:.4f}, ratio {norm / exact:.3f}")
clipped, _ = optax.clip_by_global_norm(0.7).update([jnp.full(10, value)] * 2000, optax.EmptyState())
left = sum(float((leaf.astype(jnp.float32) ** 2).sum()) for leaf in clipped) ** 0.5
print(f"clipped to 0.7: {left:.3f}")
assert abs(ratios[0] - 1) < 0.01 and ratios[2] < 0.6 and left > 1.2, "the norm is added up otherwise now"
PY
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/look.py"
