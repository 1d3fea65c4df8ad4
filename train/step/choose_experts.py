"""Which experts a phase's text uses: measured before `trainable: esft`, and written down.

L layers, E experts.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nemoe_jax.errors import UserError
from nemoe_jax.spec.schema import Tree
from nemoe_jax.utils.output_path import atomic_write
from train.data.loader import Corpus
from train.step.batch_sharding import place_whole
from train.step.chosen_experts import Places, choose
from train.step.step import Objective, split


def choose_experts(objective: Objective, params: Tree, corpus: Corpus, mesh: Mesh | None, path: Path) -> Places:
    """The experts of each layer that together have the phase's share of the routing weights on its text.

    Args:
        path: a file that says them, written here; one of an earlier attempt is taken as it is.

    Raises:
        UserError: the routers give no finite weights.
    """
    phase = objective.phase
    assert phase.esft_share
    if path.exists():
        return tuple((one["layer"], expert) for one in json.loads(path.read_text()) for expert in one["experts"])
    frozen = split(params, lambda path: False, objective.recipe.dtype)[1]
    measure = jax.jit(objective.gate_shares)
    total_LE: Any = 0
    for batch in corpus.held_out_batches(phase.data.microbatch_size, phase.esft_batches):
        total_LE = total_LE + np.asarray(jax.device_get(measure(frozen, place_whole(batch, mesh))), np.float64)
    if not (np.isfinite(total_LE).all() and total_LE.any()):
        raise UserError(f"{phase.name}: esft: the routers' weights on the text are not finite")
    places, share_LE = choose(total_LE, phase.esft_share), total_LE / total_LE.sum(axis=-1, keepdims=True)
    table = [
        {"layer": layer, "experts": own, "gate_share": round(float(share_E[own].sum()), 6)}
        for layer, share_E in enumerate(share_LE)
        for own in [[expert for at, expert in places if at == layer]]
    ]
    if jax.process_index() == 0:
        with atomic_write(path, parents=True) as partial:
            partial.write_text(json.dumps(table, indent=2) + "\n", "utf-8")
    return places
