#!/usr/bin/env bash
# torch 2.13.0, jax 0.10.2, ml_dtypes 0.6.0
#
# A cast to float8_e4m3fn, whose largest number is 448, ends differently for what is larger. torch gives 448, for
# infinity too. JAX and ml_dtypes give NaN for all above 464 (what would round to 480).
#
# Seen: 448, 464, 480, 10000 and infinity become 448, 448, 448, 448, 448 in torch and 448, 448, NaN, NaN, NaN in JAX.
#
# Why it matters: weights or a key/value cache in 8 bits that work in torch turn to NaN in JAX for the same outliers, and
# an overflow that JAX shows is hidden in torch. For equal results clip to ±448 before the cast.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0 numpy==2.3.5
cat > "$work/look.py" <<'PY'
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

values = np.array([448, 464, 480, 1e4, np.inf], np.float32)
casts = {
    "torch": torch.tensor(values).to(torch.float8_e4m3fn).float().numpy(),
    "jax": np.asarray(jnp.asarray(values).astype(jnp.float8_e4m3fn).astype(jnp.float32)),
    "ml_dtypes": values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32),
}
for name, cast in casts.items():
    print(f"{name}: {values.tolist()} -> {cast.tolist()}")
assert (casts["torch"] == 448).all(), "torch casts otherwise now"
for name in ("jax", "ml_dtypes"):
    np.testing.assert_equal(casts[name], np.array([448, 448, np.nan, np.nan, np.nan], np.float32))
PY
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/look.py"
