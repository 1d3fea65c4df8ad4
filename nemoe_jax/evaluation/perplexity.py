"""Perplexity of a long text by a sliding window: every token is scored once, with much before it.

Windows of a fixed number of tokens follow one another at a stride. The first scores all of its tokens but the very
first of the text; each later one scores what the window before it did not reach, so that each of those tokens has at
least window − stride tokens before it (the strided evaluation of fixed-length models in Hugging Face's documentation).
A small stride gives much context, and costs window / stride times the computation.
"""

import time
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from nemoe_jax.errors import UserError
from nemoe_jax.evaluation.held_out import Evaluation
from nemoe_jax.evaluation.scoring import Ending, score
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import Tree


def check_window(window: int, stride: int, context: int) -> None:
    """Raises UserError unless a window has 2 tokens to the model's context, and the stride is less than it."""
    if not 2 <= window <= context:
        raise UserError(f"window: wanted 2 to the context of {context} tokens, got {window}")
    if not 1 <= stride < window:
        raise UserError(f"stride: wanted 1 to {window - 1}, less than the window, got {stride}")


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
) -> Evaluation:
    """Mean loss over all tokens of a text but its first; of its first `windows` windows alone, where given.

    Raises:
        UserError: a text of fewer than 2 tokens, a window or a stride that does not fit.
    """
    check_window(window, stride, config.context)
    started = time.monotonic()
    spans = list(sliding_windows(len(stream), window, stride))[:windows]
    if not spans:
        raise UserError(f"text: wanted at least 2 tokens, got {len(stream)}")
    endings = [Ending(stream[start:end].astype(np.int32), count) for start, end, count in spans]
    losses = np.concatenate([-scores.logprobs for scores in score(config, params, endings, batch_size, mesh)])
    return Evaluation(float(losses.mean(dtype=np.float64)), losses.size, time.monotonic() - started, None)
