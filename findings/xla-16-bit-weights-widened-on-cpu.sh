#!/usr/bin/env bash
# jax 0.10.2, jaxlib 0.10.2
#
# A product of a few bfloat16 or float16 rows with a matrix of the same dtype, compiled for CPU, first writes the whole
# matrix as float32 into scratch memory: even for a single row, and although the matrix is an argument.
#
# Seen (1024 x 4096, 1 row; x86-64 with bfloat16 instructions): bfloat16 weights of 8.4 MB, scratch 16.8 MB, 4.1 ms;
# float32 weights of 16.8 MB, scratch 0.02 MB, 0.5 ms.
#
# Why it matters: decoding on CPU is bound by the bytes that it moves. 16-bit weights are read, written twice as large
# and read again for every token, so they are several times slower than float32 and take three times their own memory.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat > "$work/look.py" <<'PY'
import time

import jax
import jax.numpy as jnp

scratch, weights = {}, {}
for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
    row, matrix = jnp.ones((1, 1024), dtype), jnp.ones((1024, 4096), dtype)
    program = jax.jit(lambda a, b: a @ b).lower(row, matrix).compile()
    scratch[dtype], weights[dtype] = program.memory_analysis().temp_size_in_bytes, matrix.nbytes
    program(row, matrix).block_until_ready()
    start = time.perf_counter()
    for _ in range(20):
        program(row, matrix).block_until_ready()
    spent = (time.perf_counter() - start) / 20 * 1e3
    print(f"{dtype.__name__}: weights {matrix.nbytes / 1e6:.1f} MB, scratch {scratch[dtype] / 1e6:.2f} MB, {spent:.2f} ms")
assert all(scratch[dtype] >= 2 * weights[dtype] for dtype in (jnp.bfloat16, jnp.float16)), "no widened copy any more"
assert scratch[jnp.float32] < weights[jnp.float32] / 10, "float32 weights are copied as well now"
PY
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/look.py"
