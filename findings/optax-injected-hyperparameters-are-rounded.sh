#!/usr/bin/env bash
# optax 0.2.8, jax 0.10.2
#
# `optax.inject_hyperparams` gives every hyperparameter the dtype of the parameters' first array. With bfloat16
# parameters Adam's b2 of 0.999 becomes exactly 1, its bias correction divides zero by zero, and the first update is NaN.
# The same optimizer without the wrapper works, and so does `hyperparam_dtype=jnp.float32`.
#
# Seen: plain adam -0.000999, injected NaN (b1 0.898438, b2 1, learning rate 0.000999451), injected as float32 -0.001.
#
# Why it matters: the wrapper is the usual way to change or log a learning rate during training. With 16-bit weights it
# ruins the first step, and where b2 survives (0.99, say) betas and rates are still rounded to three digits.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat > "$work/look.py" <<'PY'
import jax.numpy as jnp
import optax

params, gradient = {"w": jnp.ones(4, jnp.bfloat16)}, {"w": jnp.full(4, 0.5, jnp.bfloat16)}


def first_update(optimizer):
    updates, state = optimizer.update(gradient, optimizer.init(params), params)
    return float(updates["w"][0]), state


plain, _ = first_update(optax.adam(1e-3))
injected, state = first_update(optax.inject_hyperparams(optax.adam)(learning_rate=1e-3))
wide, _ = first_update(optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)(learning_rate=1e-3))
print("injected:", {name: str(value) for name, value in state.hyperparams.items()})
print(f"first update: plain {plain:.6f}, injected {injected:.6f}, injected as float32 {wide:.6f}")
assert state.hyperparams["b2"] == 1 and injected != injected, "hyperparameters are no longer rounded to bfloat16"
assert abs(plain + 1e-3) < 1e-5 and abs(wide + 1e-3) < 1e-5
PY
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/look.py"
