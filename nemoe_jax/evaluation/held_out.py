"""Held-out loss and perplexity of a model, and how evenly its experts are used.

B batch, T sequence, L MoE layers, E experts.
"""

import contextlib
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nemoe_jax.model.transformer import forward
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import Tree
from nemoe_jax.utils.command import progress_bar


class Evaluation(NamedTuple):
    """Figures over all evaluated tokens."""

    loss: float  # nats per token
    tokens: int
    seconds: float
    load_LE: np.ndarray | None  # share of each layer's choices that went to each expert; None for a dense model

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def load_max_over_mean(self) -> float | None:
        """The busiest expert's load against the mean, averaged over layers; 1 is even."""
        if self.load_LE is None:
            return None
        return float(np.mean(self.load_LE.max(axis=1) / self.load_LE.mean(axis=1)))


def evaluate(
    config: ModelConfig, params: Tree, batches: Sequence[tuple[np.ndarray, np.ndarray]], mesh: Mesh | None = None
) -> Evaluation:
    """Mean next-token loss over batches of tokens (B, T + 1) with row weights (B,), as `text.spaced_batches` gives."""

    @jax.jit
    def measure(params, tokens, weights_B):
        output = forward(config, params, tokens[:, :-1])
        losses_BT = -jnp.take_along_axis(jax.nn.log_softmax(output.logits), tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(losses_BT.mean(axis=1) * weights_B), output.routing

    started = time.monotonic()
    total, rows, load = 0.0, 0.0, None
    with progress_bar() as bar, jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        for tokens, weights_B in bar.track(batches, description="evaluating"):
            loss, routing = measure(params, tokens, weights_B)
            total, rows = total + float(loss), rows + float(weights_B.sum())
            if routing is not None:
                load = routing.load_E if load is None else load + routing.load_E
    tokens_scored = int(rows) * (batches[0][0].shape[1] - 1)
    return Evaluation(
        loss=total / rows,
        tokens=tokens_scored,
        seconds=time.monotonic() - started,
        load_LE=None if load is None else np.asarray(load) / len(batches),
    )
