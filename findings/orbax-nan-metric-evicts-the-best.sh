#!/usr/bin/env bash
# orbax-checkpoint 0.12.8, jax 0.10.2
#
# A CheckpointManager that keeps the best checkpoint by a metric sorts by it without a thought for NaN. A step whose
# metric is NaN takes the place of the best one, which is deleted; the next finite one, however bad, is then the best.
#
# Seen (max_to_keep=1, best_mode="min"): losses 1, 2, 5, 3 keep step 0; losses 1, 2, NaN, 3 keep step 3, and the
# checkpoint of loss 1 is gone. With best_mode="max" and 3, NaN, 2, 1 step 2 is kept instead of step 0.
#
# Why it matters: one diverged evaluation costs the best checkpoint of a training run. Steps with a metric that is not
# finite must not be given to the manager.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat > "$work/look.py" <<'PY'
import logging
import math
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp

logging.disable(logging.WARNING)


def kept(number, mode, values):
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, best_fn=lambda metrics: metrics["value"], best_mode=mode, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(f"{sys.argv[1]}/{number}", options=options) as manager:
        for step, value in enumerate(values):
            manager.save(step, args=ocp.args.StandardSave({"w": jnp.ones(2)}), metrics={"value": value})
        steps = list(manager.all_steps())
        print(f"{mode} of {values}: keeps {steps}, best is {manager.best_step()}")
    return steps


nan = math.nan
assert kept(0, "min", [1.0, 2.0, 5.0, 3.0]) == [0]
assert kept(1, "min", [1.0, 2.0, nan, 3.0]) == [3], "NaN no longer evicts the best"
assert kept(2, "max", [3.0, nan, 2.0, 1.0]) == [2], "NaN no longer evicts the best"
PY
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/look.py" "$work"
