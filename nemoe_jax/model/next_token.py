"""How well a model foresees the next token, and how near its predictions are to a reference model's.

B batch, T sequence, D embed, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemoe_jax.model.token_chunks import num_chunks

CHUNK = 256  # tokens whose logits are held at once: 134 MB at a vocabulary of 131072


class NextTokenSums(NamedTuple):
    """Sums over tokens, float32; all but the first two are None without a reference."""

    loss: jax.Array  # −log p(target), nats
    correct: jax.Array  # the likeliest token is the target
    kl: jax.Array | None = None  # KL(reference ‖ model), nats
    agree: jax.Array | None = None  # both find the same token likeliest
    reference_loss: jax.Array | None = None
    reference_correct: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class NextTokenFigures:
    """Means over tokens: the figures by which a carved, pruned or quantized model is judged."""

    loss: float  # nats per token
    accuracy: float  # share of tokens that the model finds likeliest
    loss_unigram: float  # of a model that knows nothing but how often each token comes
    # against a reference model, where there is one
    kl_divergence: float | None = None  # KL(reference ‖ model), nats
    argmax_agreement: float | None = None  # share of tokens after which both find the same token likeliest
    loss_reference: float | None = None
    accuracy_reference: float | None = None

    @property
    def loss_above_reference(self) -> float | None:
        """What the model loses, nats."""
        return None if self.loss_reference is None else self.loss - self.loss_reference

    @property
    def destroyed(self) -> bool:
        """Whether the loss is above the unigram model's."""
        return not self.loss <= self.loss_unigram

    def as_dict(self, reference: str = "reference") -> dict[str, float]:
        """The figures that are there, by names that call the reference model by its own."""
        figures = dataclasses.asdict(self) | {"loss_above_reference": self.loss_above_reference}
        return {name.replace("reference", reference): value for name, value in figures.items() if value is not None}

    def verdict(self) -> str:
        """A line for people where the model is destroyed, else nothing."""
        if not self.destroyed:
            return ""
        line = (
            f"the model is destroyed: its loss of {self.loss:.2f} nats is above the {self.loss_unigram:.2f} of a model "
            "that knows nothing but how often each token comes"
        )
        if self.loss_reference is not None and not self.loss_reference <= self.loss_unigram:
            line += (
                f"; so is the {self.loss_reference:.2f} of what it is compared with: is the tokenizer that model's own?"
            )
        return line


def token_logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log p of each target, float32 in nats: (…, V), (…) -> (…)."""
    logits = logits.astype(jnp.float32)
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def next_token_sums(
    targets_BT: jax.Array,
    weights_B: jax.Array,
    logits_of: Callable[[jax.Array], jax.Array],
    x_BTD: jax.Array,
    reference_logits_of: Callable[[jax.Array], jax.Array] | None = None,
    reference_BTD: jax.Array | None = None,
) -> NextTokenSums:
    """Sums over a batch, whose logits are made a few positions at a time; jit it.

    Args:
        weights_B: 1 for the sequences that count, 0 for filling.
        logits_of: the head: hidden states (B, C, D) -> logits (B, C, V).
        reference_logits_of: the reference model's head, for its hidden states.
    """
    parts = num_chunks(targets_BT.shape[1], max(CHUNK // len(targets_BT), 1))

    def cut(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(len(array), parts, -1, *array.shape[2:]), 1, 0)

    def total(values_BC: jax.Array) -> jax.Array:
        return jnp.sum(values_BC * weights_B[:, None])

    def sums(chunk: tuple[jax.Array, jax.Array, jax.Array | None]) -> NextTokenSums:
        targets_BC, x_BCD, reference_BCD = chunk
        logits_BCV = logits_of(x_BCD)
        likeliest_BC = jnp.argmax(logits_BCV, axis=-1)
        own = total(-token_logprobs(logits_BCV, targets_BC)), total(likeliest_BC == targets_BC)
        if reference_logits_of is None or reference_BCD is None:
            return NextTokenSums(*own)
        reference_BCV = reference_logits_of(reference_BCD)
        log_p_BCV, log_q_BCV = jax.nn.log_softmax(reference_BCV), jax.nn.log_softmax(logits_BCV)
        first_BC = jnp.argmax(reference_BCV, axis=-1)
        return NextTokenSums(
            *own,
            kl=total(jnp.sum(jnp.exp(log_p_BCV) * (log_p_BCV - log_q_BCV), axis=-1)),
            agree=total(first_BC == likeliest_BC),
            reference_loss=total(-token_logprobs(reference_BCV, targets_BC)),
            reference_correct=total(first_BC == targets_BC),
        )

    reference = None if reference_BTD is None else cut(reference_BTD)
    return jax.tree.map(jnp.sum, jax.lax.map(sums, (cut(targets_BT), cut(x_BTD), reference)))


def mean_figures(sums: Sequence[NextTokenSums], tokens: int, loss_unigram: float) -> NextTokenFigures:
    """The figures of several batches with that many tokens in all."""
    loss, accuracy, *against = (
        None if column[0] is None else float(np.sum(np.asarray(column, np.float64))) / tokens
        for column in zip(*sums, strict=True)
    )
    assert loss is not None and accuracy is not None
    return NextTokenFigures(loss, accuracy, loss_unigram, *against)


def unigram_loss(targets: np.ndarray, corpus: np.ndarray) -> float:
    """Mean loss, nats, of a model that knows nothing but how often each token comes in `corpus`.

    A token that does not come there counts as if it came once, so that none is impossible.
    """
    counts = np.bincount(np.ravel(corpus), minlength=int(targets.max()) + 1)
    return float(np.mean(np.log(counts.sum() + 1) - np.log(np.maximum(counts[np.ravel(targets)], 1))))
