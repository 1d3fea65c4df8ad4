"""Perplexity of a long text by a sliding window: every token is scored once, with much before it.

Windows of a fixed number of tokens follow one another at a stride. The first scores all of its tokens but the very
first of the text; each later one scores what the window before it did not reach, so that each of those tokens has at
least window − stride tokens before it (the strided evaluation of fixed-length models in Hugging Face's documentation).
A small stride gives much context, and costs window / stride times the computation.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nemoe_jax.errors import UserError
from nemoe_jax.evaluation.scoring import Ending, score
from nemoe_jax.model.transformer import forward
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import Tree
from nemoe_jax.utils.progress import progress_bar


class PerplexityResult(NamedTuple):
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


def check_window(window: int, stride: int, context: int) -> None:
    """Raises UserError unless a window has 2 tokens to the model's context, and the stride is less than it."""
    if not 2 <= window <= context:
        raise UserError(f"window: expected 2 to the context of {context} tokens, got {window}")
    if not 1 <= stride < window:
        raise UserError(f"stride: expected 1 to {window - 1}, less than the window, got {stride}")


def sliding_windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first token, end, how many of the last ones it scores) of each window over a text of `length` tokens."""
    scored = 1  # nothing comes before the first token
    for start in range(0, length, stride):
        end = min(start + window, length)
        if end > scored:
            yield start, end, end - scored
        scored = end
        if end == length:
            return


def sliding_loss(
    config: ModelConfig,
    params: Tree,
    stream: np.ndarray,
    window: int,
    stride: int,
    *,
    batch_size: int = 8,
    windows: int | None = None,
    mesh: Mesh | None = None,
) -> PerplexityResult:
    """Mean loss over all tokens of a text but its first; of its first `windows` windows alone, where given.

    Raises:
        UserError: a text of fewer than 2 tokens, a window or a stride that does not fit.
    """
    check_window(window, stride, config.context)
    started = time.monotonic()
    spans = list(sliding_windows(len(stream), window, stride))[:windows]
    if not spans:
        raise UserError(f"text: expected at least 2 tokens, got {len(stream)}")
    endings = [Ending(stream[start:end].astype(np.int32), count) for start, end, count in spans]
    losses = np.concatenate([-scores.logprobs for scores in score(config, params, endings, batch_size, mesh)])
    return PerplexityResult(float(losses.mean(dtype=np.float64)), losses.size, time.monotonic() - started, None)


def evaluate(
    config: ModelConfig, params: Tree, batches: Sequence[tuple[np.ndarray, np.ndarray]], mesh: Mesh | None = None
) -> PerplexityResult:
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
    return PerplexityResult(
        loss=total / rows,
        tokens=tokens_scored,
        seconds=time.monotonic() - started,
        load_LE=None if load is None else np.asarray(load) / len(batches),
    )
