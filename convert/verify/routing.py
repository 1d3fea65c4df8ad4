"""Two checkpoints on the same tokens, layer by layer: how far their logits are apart, and whose experts were chosen.

Memory holds one layer of each model in float32, and all logits. Expert i of the second model stands for expert i mod E
of the first, as in an upcycled model; in models with the same number of experts each stands for itself.

B batch, T sequence, D embed, E experts of the first model, C top-k, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from convert.layerwise import BATCH, SEQUENCE_LENGTH, LayerwiseModel, logits
from convert.verify.logits import compare as compare_logits
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.model.layers import project
from nemoe_jax.model.moe import top_k_weights
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.text.corpus import spaced_batches, tokenize_corpus
from nemoe_jax.text.tokenizers.load import load_tokenizer
from nemoe_jax.utils.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class RoutingComparison:
    """What two MoE models make of the same tokens."""

    max_difference: float  # of two logits, relative to the standard deviation of the first model's
    kl_divergence: float  # mean over tokens of KL(first ‖ second), nats
    argmax_agreement: float  # share of tokens after which both find the same token likeliest
    changed_choices: float  # share of (token, layer) pairs for which other experts were chosen
    least_used_group: float  # least share, over layers, of choices that went to a group of E experts; even: E / experts
    tokens: int


def windows(source: Checkpoint, texts: Sequence[str], tokens: int, seed: int) -> list[np.ndarray]:
    """About `tokens` tokens, in batches int32 (B, T): windows of the text, or random ones where no text is given.

    Raises:
        UserError: no text, too little of it, or no tokenizer in the source.
    """
    length = min(SEQUENCE_LENGTH, source.config.context)
    batches = -(-tokens // (BATCH * length))
    if not texts:
        return list(np.random.default_rng(seed).integers(0, source.config.vocab, (batches, BATCH, length), np.int32))
    stream = tokenize_corpus(texts, load_tokenizer(source.directory), vocab=source.config.vocab)
    return [tokens_BT[:, :-1] for tokens_BT, _ in spaced_batches(stream, length, BATCH, batches)]


def compare(first: Checkpoint, second: Checkpoint, batches: Sequence[np.ndarray]) -> RoutingComparison:
    """Runs two MoE models over batches of tokens, int32 (B, T), in float32."""
    experts = first.config.experts
    models = [_Model(checkpoint, batches) for checkpoint in (first, second)]
    changed, groups = [], []
    with progress_bar() as bar:
        for layer in bar.track(range(first.config.layers), description="comparing"):
            one, other = (model.pass_layer(layer) for model in models)
            if one is not None and other is not None:
                differ_BT = (_members(one % experts, experts) != _members(other % experts, experts)).any(-1)
                changed.append(differ_BT.mean())
                load_G = np.bincount(np.ravel(other) // experts, minlength=second.config.experts // experts)
                groups.append(load_G.min() / load_G.sum())
    figures = compare_logits(models[0].logits(), models[1].logits(), tolerance=0.0)
    return RoutingComparison(
        max_difference=figures.max_difference / figures.logit_std,
        kl_divergence=figures.kl_divergence,
        argmax_agreement=figures.argmax_agreement,
        changed_choices=float(np.mean(changed)),
        least_used_group=float(min(groups)),
        tokens=figures.tokens,
    )


class _Model:
    """An MoE with the residual streams of all batches on their way through it."""

    def __init__(self, checkpoint: Checkpoint, batches: Sequence[np.ndarray]):
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.layers = LayerwiseModel(checkpoint)
        self.streams = [self.layers.embed(tokens_BT) for tokens_BT in batches]

    def pass_layer(self, layer: int) -> np.ndarray | None:
        """Takes the streams through a layer; the chosen experts (batches · B, T, C), None if the layer is dense."""
        weights = self.layers.weights(layer)
        chosen = []
        for number, x_BTD in enumerate(self.streams):
            middle_BTD, normed_BTD = self.layers.attend(layer, weights, x_BTD)
            self.streams[number] = middle_BTD + self.layers.feed_forward(layer, weights, normed_BTD)
            if "router" in weights["ffn"]:
                chosen.append(np.asarray(_choose(self.config, weights["ffn"]["router"], normed_BTD)))
        return np.concatenate(chosen) if chosen else None

    def logits(self) -> np.ndarray:
        """(batches · B, T, V), float32."""
        head = self.layers.head()
        rows = [x_TD for x_BTD in self.streams for x_TD in np.asarray(x_BTD)]
        return np.stack([np.asarray(logits(self.config.norm_eps, head, x_TD)) for x_TD in rows])


def _members(chosen_BTC: np.ndarray, experts: int) -> np.ndarray:
    """Whether each expert is among the chosen, (B, T, E)."""
    return (chosen_BTC[..., None] == np.arange(experts)).any(-2)


@functools.partial(jax.jit, static_argnums=0)
def _choose(config: ModelConfig, router_DE: jax.Array, normed_BTD: jax.Array) -> jax.Array:
    """The chosen experts, (B, T, C)."""
    return top_k_weights(project(normed_BTD, router_DE, 1, None), config.top_k, config.normalize_top_k)[1]
