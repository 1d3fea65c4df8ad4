"""Perplexity of a long text by a sliding window: every token is scored once, with much before it.

Windows of a fixed number of tokens follow one another at a stride. The first scores all of its tokens but the very
first of the text; each later one scores what the window before it did not reach, so that each of those tokens has at
least window − stride tokens before it (the strided evaluation of fixed-length models in Hugging Face's documentation).
A small stride gives much context, and costs window / stride times the computation.
"""

import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from nemoe_jax.errors import UserError
from nemoe_jax.evaluation.scoring import Ending, score
from nemoe_jax.model.next_token import NextTokenFigures, mean_figures, next_token_sums, unigram_loss
from nemoe_jax.model.transformer import hidden_states, logits
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.mesh import use_mesh
from nemoe_jax.spec.schema import Tree
from nemoe_jax.utils.progress import progress_bar


class PerplexityResult(NamedTuple):
    """Figures over all evaluated tokens."""

    figures: NextTokenFigures
    tokens: int
    seconds: float
    load_LE: np.ndarray | None  # share of each layer's choices that went to each expert; None for a dense model

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.figures.loss

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


class Reference(NamedTuple):
    """A model's predictions that others are compared with."""

    config: ModelConfig
    head: Tree  # what `logits` reads
    x_BTD: list[jax.Array]  # of each batch: hidden states, which are small beside logits


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
    scores = score(config, params, endings, batch_size, mesh)
    logprobs = np.concatenate([one.logprobs for one in scores])
    figures = NextTokenFigures(
        loss=float(-logprobs.mean(dtype=np.float64)),
        accuracy=float(np.concatenate([one.greedy for one in scores]).mean()),
        loss_unigram=unigram_loss(np.concatenate([one.tokens[-one.last :] for one in endings]), stream),
    )
    return PerplexityResult(figures, logprobs.size, time.monotonic() - started, None)


def reference_predictions(
    config: ModelConfig, params: Tree, batches: Sequence[tuple[np.ndarray, np.ndarray]], mesh: Mesh | None = None
) -> Reference:
    """What `evaluate` compares models with; the other weights are no longer needed.

    Args:
        batches: those of `evaluate`.
    """

    @jax.jit
    def states(params, tokens):
        return hidden_states(config, params, tokens[:, :-1]).x_BTD

    with progress_bar() as bar, use_mesh(mesh):
        x_BTD = [states(params, tokens) for tokens, _ in bar.track(batches, description="reference")]
    return Reference(config, {name: params[name] for name in ("embed" if config.tied else "head",)}, x_BTD)


def evaluate(
    config: ModelConfig,
    params: Tree,
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
    mesh: Mesh | None = None,
    *,
    reference: Reference | None = None,
    corpus: np.ndarray | None = None,
) -> PerplexityResult:
    """Next-token figures over batches of tokens (B, T + 1) with weights (B,), as `corpus.spaced_batches` gives.

    Args:
        reference: a model of the same vocabulary, on the same batches.
        corpus: tokens whose frequencies the unigram model knows; by default the batches' own.
    """

    @jax.jit
    def measure(params, reference_head, reference_BTD, tokens, weights_B):
        output = hidden_states(config, params, tokens[:, :-1])
        against: tuple[Any, ...] = ()
        if reference is not None:
            against = functools.partial(logits, reference.config, reference_head), reference_BTD
        head = functools.partial(logits, config, params)
        return next_token_sums(tokens[:, 1:], weights_B, head, output.x_BTD, *against), output.routing

    started = time.monotonic()
    sums, load = [], None
    with progress_bar() as bar, use_mesh(mesh):
        for number, (tokens, weights_B) in enumerate(bar.track(batches, description="evaluating")):
            against = (None, None) if reference is None else (reference.head, reference.x_BTD[number])
            of_batch, routing = measure(params, *against, tokens, weights_B)
            sums.append(jax.device_get(of_batch))
            if routing is not None:
                load = routing.load_E if load is None else load + routing.load_E
    targets = np.concatenate([tokens[weights_B > 0, 1:] for tokens, weights_B in batches])
    return PerplexityResult(
        mean_figures(sums, targets.size, unigram_loss(targets, targets if corpus is None else corpus)),
        tokens=targets.size,
        seconds=time.monotonic() - started,
        load_LE=None if load is None else np.asarray(load) / len(batches),
    )
