#!/usr/bin/env bash
# optax 0.2.8, jax 0.10.2
#
# Adam's state has the parameters' dtype. In bfloat16 the running mean of squares v, which moves by a thousandth of its
# distance in a step, stops as soon as that step is less than half of v's last digit. `mu_dtype` widens the first moment
# only; there is no such option for the second.
#
# Seen (gradients of 1, so v should tend to 1 and the update to -1): after 4000 steps v is 0.5 and the update -1.375 in
# bfloat16, with and without mu_dtype=float32; 0.9817 and -1 in float32.
#
# Why it matters: weights in bfloat16 train with steps that are too large by √2 and more, and no message. Parameters or
# the optimizer's copy of them have to be float32.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat > "$work/look.py" <<'PY'
import jax
import jax.numpy as jnp
import optax


def run(dtype, **options):
    optimizer = optax.adam(1.0, b2=0.999, **options)
    gradient = jnp.ones(1, dtype)
    update, state = jax.jit(optimizer.update), optimizer.init(gradient)
    for _ in range(4000):
        step, state = update(gradient, state)
    return float(state[0].nu[0]), float(step[0])


cases = {
    "float32": run(jnp.float32),
    "bfloat16": run(jnp.bfloat16),
    "bfloat16, mu_dtype=float32": run(jnp.bfloat16, mu_dtype=jnp.float32),
}
for name, (nu, step) in cases.items():
    print(f"{name}: second moment {nu:.4f}, update {step:.4f}")
assert cases["float32"][0] > 0.95, cases
assert all(cases[name][0] <= 0.5 and cases[name][1] < -1.3 for name in list(cases)[1:]), "the moment no longer stalls"
PY
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/look.py"
