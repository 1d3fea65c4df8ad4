"""A model run layer by layer over calibration text, with one layer's weights in memory at a time.

    stream = LayerwiseModel(checkpoint)
    weights = stream.weights(layer)                       # the schema's tree of one block, float32
    middle_BTD, normed_BTD = stream.attend(layer, weights, x_BTD)
    after_BTD = middle_BTD + stream.feed_forward(layer, weights, normed_BTD)

The caller keeps the residual streams, one array for each batch, and decides what goes from layer to layer: the model's
own FFN or what is to replace it. On several devices the batches are cut over all of them and the weights are on each.

B batch, T sequence, D embed, V vocabulary.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.model.attention import Context
from nemoe_jax.model.layers import NO_ADAPTERS, project, rms_norm
from nemoe_jax.model.next_token import NextTokenFigures, NextTokenSums, mean_figures, next_token_sums
from nemoe_jax.model.transformer import Block
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.mesh import make_mesh
from nemoe_jax.spec.schema import ParamSpec, Tree, declare, leaves, unflatten
from nemoe_jax.text.corpus import spaced_batches, tokenize_corpus
from nemoe_jax.text.tokenizers.load import load_tokenizer

SEQUENCE_LENGTH = 256
BATCH = 8
HELD_OUT = 10  # every tenth batch, and at least one

Arrays = TypeVar("Arrays")


def calibration_batches(source: Checkpoint, texts: Sequence[str], tokens: int) -> list[np.ndarray]:
    """Evenly spaced windows of `tokens` tokens in all, rounded up to whole batches: int32 (B, T + 1) each.

    Args:
        texts: sources as `tokenize_corpus` takes them; or each with its share of the tokens behind a colon, the windows
            of all then spread evenly over the whole.

    Raises:
        UserError: no text, less of it than that, or no tokenizer in the source.
    """
    if tokens < 1:
        raise UserError(f"--calibration-tokens: expected a positive number, got {tokens}")
    tokenizer = load_tokenizer(source.directory)
    length = min(SEQUENCE_LENGTH, source.config.context)
    batches = -(-tokens // (BATCH * length))
    parts = _with_shares(texts)
    total = sum(share for _, share in parts)
    ends = np.round(np.cumsum([0.0, *(share for _, share in parts)]) / total * batches * BATCH).astype(int)
    rows, places = [], []
    for (words, _), windows in zip(parts, np.diff(ends), strict=True):
        stream = tokenize_corpus(words, tokenizer, "tokenizing calibration text", source.config.vocab)
        if len(stream) <= windows * length:
            raise UserError(
                f"--calibration {' '.join(words)}: expected more than {windows * length:,} tokens "
                f"(--calibration-tokens {tokens}, in batches of {BATCH * length:,}), got {len(stream):,}"
            )
        if windows:
            rows.append(np.concatenate([row_BT for row_BT, _ in spaced_batches(stream, length, 1, windows)]))
            places.append((np.arange(windows) + 0.5) / windows)
    order = np.argsort(np.concatenate(places), kind="stable")
    return list(np.concatenate(rows)[order].reshape(batches, BATCH, -1))


def _with_shares(texts: Sequence[str]) -> list[tuple[list[str], float]]:
    """Sources that are read as one, and their share of the tokens; `A:0.5,B:0.5` is two words."""
    split = [_share_of(word) for text in texts for word in _words(text)]
    if not any(split):
        return [(list(texts), 1.0)]
    if not all(split):
        raise UserError(f"--calibration {' '.join(texts)}: expected a share of the tokens behind each text, or none")
    parts = [([found[1]], float(found[2])) for found in split if found]
    if not all(share > 0 for _, share in parts):
        raise UserError(f"--calibration {' '.join(texts)}: expected positive shares")
    return parts


def _words(text: str) -> list[str]:
    """What commas separate, where every part has a share."""
    words = text.split(",")
    return words if not Path(text).exists() and all(map(_share_of, words)) else [text]


def _share_of(word: str) -> re.Match[str] | None:
    """A source and its share of the tokens; None of a word that is a file's name, or says none."""
    return None if Path(word).exists() else re.fullmatch(r"(.+):([0-9]*\.?[0-9]+)", word)


def hash_of(batches: Sequence[np.ndarray]) -> dict[str, str]:
    """The calibration text's SHA-256, for `convert_layers`."""
    return {"calibration_sha256": hashlib.sha256(b"".join(tokens_BS.tobytes() for tokens_BS in batches)).hexdigest()}


def fitted_batches(batches: Sequence[np.ndarray]) -> int:
    """How many of the batches are for fitting; the rest, the last tenth and at least one, is held out.

    Raises:
        UserError: a single batch, which cannot be both.
    """
    if len(batches) < 2:
        raise UserError(
            f"--calibration-tokens: expected more than {batches[0][:, 1:].size:,}, for two batches, one held out"
        )
    return len(batches) - max(len(batches) // HELD_OUT, 1)


def in_turn(results: Iterable[Arrays]) -> Iterator[Arrays]:
    """The results of programs that add up over devices, each begun when the one before it has ended.

    In flight together on several CPU devices they can wait for one another for ever: XLA orders the collectives of
    programs that it compiled, but not of those that it read from the compilation cache.
    """
    return map(jax.block_until_ready, results)


class TensorSource(Protocol):
    """What is read of a checkpoint, or of one that is yet to be written."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def directory(self) -> Path: ...
    def view(self, key: str, dtype: Any = None) -> np.ndarray:
        """A tensor by its checkpoint key."""


class LayerwiseModel:
    """The layers of a checkpoint as functions of residual streams, in float32."""

    def __init__(self, source: TensorSource):
        self.source, self.config = source, source.config
        devices = jax.local_devices()
        devices = devices if BATCH % len(devices) == 0 else devices[:1]
        self.mesh = make_mesh({"data": len(devices)}, devices)
        self.cut, self.whole = (NamedSharding(self.mesh, place) for place in (PartitionSpec("data"), PartitionSpec()))

    def embed(self, tokens_BT: np.ndarray) -> jax.Array:
        """The residual stream before the first layer, (B, T, D)."""
        table = self.source.view(declare(self.config)["embed"].key)
        return jax.device_put(np.asarray(table[tokens_BT], np.float32), self.cut)

    def weights(self, layer: int) -> Tree:
        """One block's arrays, float32, without the axis of layers."""
        return jax.device_put(block_weights(self.config, layer, self.source.view), self.whole)

    def attend(self, layer: int, weights: Tree, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(the stream after attention, what the FFN reads: its normalized copy)."""
        with jax.set_mesh(self.mesh):  # each device runs its own sequences: without it they would gather one another's
            return _attend(self.config, kind_of(self.config, layer), weights, x_BTD)

    def feed_forward(self, layer: int, weights: Tree, normed_BTD: jax.Array) -> jax.Array:
        """What the FFN adds to the stream."""
        with jax.set_mesh(self.mesh):
            return feed_forward(self.config, kind_of(self.config, layer), weights, normed_BTD)

    def through(self, layer: int, weights: Tree, x_BTD: jax.Array) -> jax.Array:
        """The stream after a layer."""
        middle_BTD, normed_BTD = self.attend(layer, weights, x_BTD)
        return middle_BTD + self.feed_forward(layer, weights, normed_BTD)

    def head(self) -> tuple[jax.Array, jax.Array]:
        """The final norm's weight (D,), float32, and the head (V, D), for `logits`."""
        specs = declare(self.config)
        norm_D, head_VD = (
            np.asarray(self.source.view(specs[name].key)) for name in ("norm", "embed" if self.config.tied else "head")
        )
        return jax.device_put((norm_D.astype(np.float32), head_VD), self.whole)

    def next_token(
        self,
        streams: Sequence[jax.Array],
        reference: Sequence[jax.Array],
        batches: Sequence[np.ndarray],
        unigram: float,
    ) -> NextTokenFigures:
        """Figures of residual streams that have passed the last layer, against those of another model with this head.

        Args:
            unigram: the unigram model's loss, for the figures.
        """
        eps, head = self.config.norm_eps, self.head()
        sums = in_turn(
            _next_token(eps, head, x_BTD, other_BTD, jax.device_put(tokens_BS[:, 1:], self.cut))
            for x_BTD, other_BTD, tokens_BS in zip(streams, reference, batches, strict=True)
        )
        return mean_figures(jax.device_get(list(sums)), sum(tokens[:, 1:].size for tokens in batches), unigram)


def kind_of(config: ModelConfig, layer: int) -> str:
    """Whether a layer is "dense" or "moe"."""
    return next(run.kind for run in config.runs if run.first <= layer < run.first + run.layers)


def block_weights(config: ModelConfig, layer: int, view: Callable[[str], np.ndarray]) -> Tree:
    """One layer's arrays in the schema's layout, float32, from tensors by checkpoint key."""

    def read(spec: ParamSpec) -> np.ndarray:
        keys = [key for index, key in spec.tensors() if index[0] == layer - spec.first_layer]
        tensors = [view(key).T if spec.transposed else view(key) for key in keys]
        return np.stack([tensor.astype(np.float32) for tensor in tensors]).reshape(spec.shape[1:])

    return unflatten(
        {path: read(spec) for path, spec in leaves(declare(config)["blocks"][kind_of(config, layer)]).items()}
    )


@functools.lru_cache(maxsize=32)
def block_graph(config: ModelConfig, kind: str) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Block(config, declare(config)["blocks"][kind])))[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend(config: ModelConfig, kind: str, weights: Tree, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    positions = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    middle, normed, *_ = nnx.merge(block_graph(config, kind), weights).attend(
        x_BTD, Context(positions, None, None), None, NO_ADAPTERS
    )
    return middle, normed


@functools.partial(jax.jit, static_argnums=(0, 1))
def feed_forward(config: ModelConfig, kind: str, weights: Tree, normed_BTD: jax.Array) -> jax.Array:
    """What the FFN of a block with those weights adds to the stream, (B, T, D)."""
    return nnx.merge(block_graph(config, kind), weights).feed_forward(normed_BTD)[0]


@jax.jit
def hidden(ffn: Tree, x_BTD: jax.Array) -> jax.Array:
    """What a dense FFN's `down` reads: silu(gate(x)) · up(x), (B, T, F)."""
    return jax.nn.silu(project(x_BTD, ffn["gate"], 1, None)) * project(x_BTD, ffn["up"], 1, None)


@functools.partial(jax.jit, static_argnums=0)
def _next_token(
    eps: float, head: tuple[jax.Array, jax.Array], x_BTD: jax.Array, reference_BTD: jax.Array, targets_BT: jax.Array
) -> NextTokenSums:
    to_logits = functools.partial(logits, eps, head)
    return next_token_sums(targets_BT, jnp.ones(len(targets_BT)), to_logits, x_BTD, to_logits, reference_BTD)


@functools.partial(jax.jit, static_argnums=0)
def logits(eps: float, head: tuple[jax.Array, jax.Array], x_BTD: jax.Array) -> jax.Array:
    """Float32 logits (…, V) of residual streams (…, D) that have passed the last layer."""
    norm_D, head_VD = head
    normed_BTD = rms_norm(x_BTD, norm_D, eps)
    return jnp.matmul(normed_BTD, head_VD.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
