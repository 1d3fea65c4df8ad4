"""What calibration text adds to a carve: a router that knows which experts matter, and `down` fitted to its choices.

The dense model and what has been carved of it run side by side, layer by layer. In each layer, on the inputs that the
carved layers before it give:

1. Router. A token wants the experts whose outputs are largest: the target is each expert's share of the outputs'
   energy. A ridge regression of its logarithm starts the router; cross-entropy, with a penalty on uneven load, finishes
   it. Its rows are then made so short that the chosen experts weigh nearly the same: who is chosen stays, and equal
   weights serve the refit far better than the shares that the router was trained to tell.
2. Scale. Least squares finds the factor of each expert's `down` with which the MoE FFN comes nearest to the dense FFN.
3. Refit. With the choices fixed, the MoE FFN is linear in `down`: y = Φ·down, where token t's row of Φ holds the hidden
   activations of its chosen experts times their routing weights, and zeros. Ridge regression towards the scaled weights
   of step 2 gives all experts' `down` at once. Its y leads from the carved model's stream to the dense model's after
   the layer, so that each layer mends what those before it got wrong.

The last tenth of the text is held out of every fit; errors are measured on it.

B batch, T sequence, D embed, F neurons of the dense FFN, E experts, C top-k.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from jax.typing import ArrayLike

from convert.carve.self_text import SELF, sample_text
from convert.layerwise import (
    LayerwiseModel,
    block_weights,
    calibration_batches,
    feed_forward,
    fitted_batches,
    hidden,
    in_turn,
    kind_of,
)
from convert.streaming import Figures, Tensors
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.model.moe import top_k_weights
from nemoe_jax.model.next_token import unigram_loss
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import Tree

ROUTER_STEPS = 300  # each on one batch
ROUTER_LOGIT_STEP = 0.5  # how far Adam's first step may move a logit; falls to 0 along a cosine
ROUTER_RIDGE = 1e-2  # of the mean diagonal
ROUTER_BALANCE = 1.0  # weight of the load-balancing loss (Fedus et al. 2021, arXiv 2101.03961)
RIDGE_TOKENS = 2.0  # the refit's ridge is worth this many tokens for each neuron
SHARED_GATE = 0.5  # what a shared expert is multiplied by: the sigmoid of a gate of zeros
SCALE_RIDGE = 1e-3  # of the mean diagonal: pulls an expert that is seldom chosen towards the common scale

_ADAM = optax.scale_by_adam()
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass
class LayerText:
    """What the FFN of one layer reads and should give, one array (B, T, D) for each batch."""

    ffn: Tree  # the dense FFN: gate, up (D, F) and down (F, D)
    inputs: Sequence[jax.Array]
    wanted: Sequence[jax.Array]  # with which the stream after the layer would be the dense model's
    weights: Sequence[jax.Array] = ()  # (B, T): what a squared error counts, see `token_weights`

    @property
    def tokens(self) -> int:
        """How many there are."""
        return sum(math.prod(x_BTD.shape[:-1]) for x_BTD in self.inputs)

    @property
    def energy(self) -> float:
        """What is wanted, squared, by the tokens' weights; the mean over tokens."""
        sums = in_turn(map(_energies_of_tokens, self.wanted, self.weights))
        return sum(float(both[1]) for both in sums) / self.tokens

    def hidden(self, number: int) -> jax.Array:
        """The hidden activations (B, T, F) of a batch."""
        return hidden(self.ffn, self.inputs[number])

    def restricted(self, neurons_S: np.ndarray) -> "LayerText":
        """The same text for an FFN of some of the neurons."""
        ffn = {name: self.ffn[name][:, neurons_S] for name in ("gate", "up")} | {"down": self.ffn["down"][neurons_S]}
        return dataclasses.replace(self, ffn=ffn)


class CalibrationStreams:
    """The dense model and what has been carved of it so far, over the same calibration text."""

    def __init__(self, source: Checkpoint, texts: Sequence[str], tokens: int, seed: int = 0):
        """Reads and tokenizes the text, or has the dense model write it.

        Args:
            texts: files, directories or globs, or `SELF` alone.
            seed: of the text that the model writes.

        Raises:
            UserError: no text, too little of it, or no tokenizer in the source.
        """
        self.layers = LayerwiseModel(source)
        self.sampled = sample_text(source, tokens, seed) if tuple(texts) == (SELF,) else None
        self.batches = self.sampled.batches if self.sampled else calibration_batches(source, texts, tokens)
        self.fitted = fitted_batches(self.batches)
        self.dense = [self.layers.embed(tokens_BS[:, :-1]) for tokens_BS in self.batches]
        self.carved = list(self.dense)
        self._entered = -1  # the last layer that was

    def enter(self, layer: int) -> tuple[LayerText, LayerText]:
        """The layer's text to fit on and the held-out text; layers come in ascending order."""
        weights = self.layers.weights(layer)
        self._after_attention, inputs, wanted = [], [], []
        for number, (dense_BTD, carved_BTD) in enumerate(zip(self.dense, self.carved, strict=True)):
            middle_BTD, normed_BTD = self.layers.attend(layer, weights, dense_BTD)
            self.dense[number] = middle_BTD + self.layers.feed_forward(layer, weights, normed_BTD)
            middle_BTD, normed_BTD = self.layers.attend(layer, weights, carved_BTD)
            self._after_attention.append(middle_BTD)
            inputs.append(normed_BTD)
            wanted.append(self.dense[number] - middle_BTD)
        weighed = token_weights(self.dense, wanted)
        self._inputs, self._entered = inputs, layer
        parts = slice(None, self.fitted), slice(self.fitted, None)
        fitted, held_out = (LayerText(weights["ffn"], inputs[part], wanted[part], weighed[part]) for part in parts)
        return fitted, held_out

    def leave(self, layer: int, config: ModelConfig, written: Tensors) -> None:
        """Goes on to the next layer, the carved model through its FFN as it was written."""
        if self._entered != layer:  # it was carved before an interruption
            self.enter(layer)
        self.carved = self._through(layer, config, written.__getitem__, 0)

    def held_out_through(self, layer: int, config: ModelConfig, ffn: Tensors) -> list[jax.Array]:
        """The held-out streams after the layer that was entered last, through another FFN in its place."""
        source = self.layers.source
        return self._through(layer, config, lambda key: ffn[key] if key in ffn else source.view(key), self.fitted)

    def pass_by(self) -> None:
        """Goes on to the next layer with the dense model's own FFN."""
        self.carved = list(self.dense)

    def _through(
        self, layer: int, config: ModelConfig, view: Callable[[str], np.ndarray], first: int
    ) -> list[jax.Array]:
        carved = jax.device_put(block_weights(config, layer, view), self.layers.whole)
        kind = kind_of(config, layer)
        with jax.set_mesh(self.layers.mesh):
            return [
                middle_BTD + feed_forward(config, kind, carved, x_BTD)
                for middle_BTD, x_BTD in zip(self._after_attention[first:], self._inputs[first:], strict=True)
            ]

    @property
    def unigram(self) -> float:
        """The loss on the held-out text of a model that knows nothing but how often each token comes."""
        return unigram_loss(*(np.concatenate(part)[:, 1:] for part in (self.batches[self.fitted :], self.batches)))

    def figures(self) -> Figures:
        """What the carved model keeps of the dense one, on the held-out text: means over tokens, losses in nats."""
        batches = self.batches[self.fitted :]
        figures = self.layers.next_token(self.carved[self.fitted :], self.dense[self.fitted :], batches, self.unigram)
        held_out = {f"held_out_{name}": value for name, value in figures.as_dict("dense").items()}
        return {
            "held_out_tokens": sum(tokens_BS[:, 1:].size for tokens_BS in batches),
            "held_out_loss_carved": held_out.pop("held_out_loss"),
            **held_out,
            "destroyed": figures.destroyed,
            "verdict": figures.verdict(),
        }


def token_weights(streams: Sequence[jax.Array], wanted: Sequence[jax.Array]) -> list[jax.Array]:
    """What a squared error counts on each token, (B, T) for each batch.

    The next norm divides a token by the size of the stream, hence an error counts relative to it. By that alone, a fit
    would give up the few massive tokens that attention in later layers depends on, which decide nearly all of the
    unweighted error. So both count: the relative error and the plain one, each as a share of what all tokens want.
    """
    relative = [_inverse_mean_square(x_BTD) for x_BTD in streams]
    energies = in_turn(_energies_of_tokens(y_BTD, weight_BT) for y_BTD, weight_BT in zip(wanted, relative, strict=True))
    plain, weighted = np.sum([np.asarray(energy) for energy in energies], axis=0)
    return [weight_BT / weighted * plain + 1 for weight_BT in relative]


def activity(text: LayerText) -> jax.Array:
    """Mean squared output of each neuron, (F,)."""
    squares_F = sum(in_turn(_mean_squares(text.hidden(number)) for number in range(len(text.inputs))))
    return squares_F / len(text.inputs) * jnp.sum(text.ffn["down"] ** 2, axis=1)


def distilled_router(text: LayerText, label_F: jax.Array, experts: int, top_k: int, logit_std: float) -> jax.Array:
    """Router rows (E, D) that tell from the input which experts' outputs will be largest.

    Args:
        logit_std: the logits' standard deviation on this text, about each token's mean.
    """
    members_EF = _members(label_F, experts)
    targets = [_energy_shares(text.hidden(number), text.ffn["down"], members_EF) for number in range(len(text.inputs))]
    gram_DD, moment_DE = 0.0, 0.0
    for gram, moment in in_turn(map(_ridge_sums, text.inputs, targets)):
        gram_DD, moment_DE = gram_DD + gram, moment_DE + moment
    router_ED = ridge_solve(gram_DD, moment_DE, ROUTER_RIDGE).T
    # Adam moves every weight by about its learning rate, so a logit by that times the sum of the inputs' sizes
    fall = optax.cosine_decay_schedule(ROUTER_LOGIT_STEP / float(_sum_of_sizes(text.inputs[0])), ROUTER_STEPS)
    state = _ADAM.init(router_ED)
    for step in range(ROUTER_STEPS):
        number = step % len(targets)
        router_ED, state = _router_step(top_k, router_ED, state, text.inputs[number], targets[number], fall(step))
        jax.block_until_ready(router_ED)
    router_ED -= router_ED.mean(axis=0)  # what is common to all experts' logits chooses nothing
    variances = in_turn(_logit_variance(x_BTD, router_ED) for x_BTD in text.inputs)
    return router_ED * (logit_std / jnp.sqrt(jnp.mean(jnp.stack(list(variances)))))


def normal_equations(
    text: LayerText,
    label_F: jax.Array | None = None,
    router_ED: jax.Array | None = None,
    top_k: int = 0,
    weighted: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """ΦᵀΦ (F, F) and Φᵀy (F, D) of the hidden activations and the expected outputs, means over tokens.

    The activations are times their experts' routing weights, or as they are where there is no router.

    Args:
        weighted: by the text's weights of its tokens, instead of alike.
    """
    neurons, width = text.ffn["down"].shape
    gram_FF, moment_FD = jnp.zeros((neurons, neurons)), jnp.zeros((neurons, width))
    sums = in_turn(
        _normal_sums(
            text.hidden(number), x_BTD, y_BTD, text.weights[number] if weighted else None, label_F, router_ED, top_k
        )
        for number, (x_BTD, y_BTD) in enumerate(zip(text.inputs, text.wanted, strict=True))
    )
    for gram, moment in sums:
        gram_FF, moment_FD = gram_FF + gram, moment_FD + moment
    return gram_FF / text.tokens, moment_FD / text.tokens


@functools.partial(jax.jit, static_argnames="groups")
def output_scale(
    gram_FF: jax.Array, moment_FD: jax.Array, down_FD: jax.Array, label_F: jax.Array, groups: int
) -> jax.Array:
    """The factor of each group's `down`, (groups,), with which the MoE FFN comes nearest to the target output.

    Least squares on the normal equations of all of `down`, with a small ridge towards the common factor.

    Args:
        label_F: the expert of each neuron, or another group of neurons that want a factor of their own.
    """
    member_FE = jax.nn.one_hot(label_F, groups)
    products_FF = gram_FF * _einsum("FD,GD->FG", down_FD, down_FD)
    gram_EE = _einsum("FE,FG,GH->EH", member_FE, products_FF, member_FE)
    moment_E = _einsum("FE,F->E", member_FE, jnp.sum(moment_FD * down_FD, axis=1))
    common = moment_E.sum() / gram_EE.sum()
    ridge = SCALE_RIDGE * jnp.trace(gram_EE) / groups
    return jnp.linalg.solve(gram_EE + ridge * jnp.eye(groups), moment_E + ridge * common)


def ridge_solve(gram: ArrayLike, moment: ArrayLike, ridge: float, towards: ArrayLike = 0.0) -> jax.Array:
    """(gram + λI)⁻¹ (moment + λ·towards) with λ = ridge · the mean diagonal of gram, by LAPACK on the host."""
    gram_FF, moment_FD = np.array(gram), np.asarray(moment)
    weight = np.float32(ridge * np.trace(gram_FF) / len(gram_FF))
    gram_FF[np.diag_indices_from(gram_FF)] += weight
    return jnp.asarray(scipy.linalg.solve(gram_FF, moment_FD + weight * np.asarray(towards), assume_a="pos"))


def measure(text: LayerText, label_F: jax.Array, router_ED: jax.Array, down_FD: jax.Array, top_k: int) -> Figures:
    """How a carved layer does on a text: error, recall of the experts that matter, load."""
    members_EF = _members(label_F, len(router_ED))
    sums = in_turn(
        _measures(text.hidden(number), x_BTD, label_F, members_EF, router_ED, text.ffn["down"], down_FD, top_k)
        for number, x_BTD in enumerate(text.inputs)
    )
    error, energy, recall, load_E = (
        np.mean([np.asarray(part) for part in parts], axis=0) for parts in zip(*sums, strict=True)
    )
    return {
        "reconstruction_error": float(error / energy),  # of the dense FFN's output on the same inputs, in squares
        "recall": float(recall),  # share of the experts with the largest outputs that were chosen
        "load_max_over_mean": float(load_E.max() / load_E.mean()),
    }


def reconstruction_error(dense: LayerText, other: LayerText) -> float:
    """Squared error of another FFN's output to the dense one's on the same inputs, relative to that output."""
    sums = in_turn(
        _squares(dense.hidden(number), dense.ffn["down"], other.hidden(number), other.ffn["down"])
        for number in range(len(dense.inputs))
    )
    error, energy = (float(np.sum(jax.device_get(parts))) for parts in zip(*sums, strict=True))
    return error / energy


@jax.jit
def _squares(hidden_BTF, down_FD, other_BTS, down_SD):
    y_BTD = _einsum("BTF,FD->BTD", hidden_BTF, down_FD)
    return jnp.sum((_einsum("BTS,SD->BTD", other_BTS, down_SD) - y_BTD) ** 2), jnp.sum(y_BTD**2)


def _members(label_F: jax.Array, experts: int) -> np.ndarray:
    """Each expert's neurons, (E, F/E): all experts have as many, and a shared one's are the last."""
    labels = np.asarray(label_F)
    return np.argsort(labels, kind="stable")[: np.sum(labels < experts)].reshape(experts, -1)


def _energies(hidden_BTF, down_FD, members_EF):
    """‖output‖² of each expert, (B, T, E)."""

    def of_expert(members_F):
        return jnp.sum(_einsum("BTF,FD->BTD", hidden_BTF[..., members_F], down_FD[members_F]) ** 2, axis=-1)

    return jnp.moveaxis(jax.lax.map(of_expert, members_EF), 0, -1)


@jax.jit
def _energy_shares(hidden_BTF, down_FD, members_EF):
    energies_BTE = _energies(hidden_BTF, down_FD, members_EF)
    return energies_BTE / jnp.maximum(energies_BTE.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


@jax.jit
def _ridge_sums(x_BTD, target_BTE):
    logits_BTE = jnp.log(target_BTE + 1e-6)
    logits_BTE -= logits_BTE.mean(-1, keepdims=True)
    return _einsum("BTD,BTH->DH", x_BTD, x_BTD), _einsum("BTD,BTE->DE", x_BTD, logits_BTE)


@jax.jit
def _logit_variance(x_BTD, router_ED):
    return jnp.mean(_einsum("BTD,ED->BTE", x_BTD, router_ED) ** 2)


@jax.jit
def _sum_of_sizes(x_BTD):
    return jnp.mean(jnp.sum(jnp.abs(x_BTD), axis=-1))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _router_step(top_k, router_ED, state, x_BTD, target_BTE, learning_rate):
    def loss(router_ED):
        logits_BTE = _einsum("BTD,ED->BTE", x_BTD, router_ED)
        cross_entropy = -jnp.mean(jnp.sum(target_BTE * jax.nn.log_softmax(logits_BTE), axis=-1))
        chosen_BTE = logits_BTE >= jax.lax.top_k(logits_BTE, top_k)[0][..., -1:]
        load_E = jnp.mean(chosen_BTE, axis=(0, 1)) / top_k
        balance = len(load_E) * jnp.sum(load_E * jax.nn.softmax(logits_BTE).mean((0, 1)))
        return cross_entropy + ROUTER_BALANCE * balance

    direction_ED, state = _ADAM.update(jax.grad(loss)(router_ED), state)
    return router_ED - learning_rate * direction_ED, state


def _routing_weights(x_BTD, router_ED, top_k):
    """(B, T, E): softmax over the chosen experts' logits, 0 elsewhere."""
    weights_BTC, chosen_BTC = top_k_weights(_einsum("BTD,ED->BTE", x_BTD, router_ED), top_k)
    return _einsum("BTC,BTCE->BTE", weights_BTC, jax.nn.one_hot(chosen_BTC, len(router_ED)))


def _by_neuron(weights_BTE, label_F):
    """(B, T, F): each neuron's routing weight; a neuron with the label E belongs to the shared expert."""
    return jnp.pad(weights_BTE, ((0, 0), (0, 0), (0, 1)), constant_values=SHARED_GATE)[..., label_F]


@jax.jit
def _inverse_mean_square(x_BTD):
    return 1 / jnp.maximum(jnp.mean(x_BTD**2, axis=-1), jnp.finfo(jnp.float32).tiny)


@jax.jit
def _energies_of_tokens(y_BTD, weight_BT):
    square_BT = jnp.sum(y_BTD**2, axis=-1)
    return jnp.stack([square_BT.sum(), (square_BT * weight_BT).sum()])


@jax.jit
def _mean_squares(hidden_BTF):
    return jnp.mean(hidden_BTF**2, axis=(0, 1))


@functools.partial(jax.jit, static_argnames="top_k")
def _normal_sums(hidden_BTF, x_BTD, y_BTD, weight_BT, label_F, router_ED, top_k):
    if router_ED is None:
        weighted_BTF = hidden_BTF
    else:
        weighted_BTF = hidden_BTF * _by_neuron(_routing_weights(x_BTD, router_ED, top_k), label_F)
    counted_BTF = weighted_BTF if weight_BT is None else weighted_BTF * weight_BT[..., None]
    return _einsum("BTF,BTG->FG", counted_BTF, weighted_BTF), _einsum("BTF,BTD->FD", counted_BTF, y_BTD)


@functools.partial(jax.jit, static_argnames="top_k")
def _measures(hidden_BTF, x_BTD, label_F, members_EF, router_ED, dense_down_FD, down_FD, top_k):
    y_BTD = _einsum("BTF,FD->BTD", hidden_BTF, dense_down_FD)
    weights_BTE = _routing_weights(x_BTD, router_ED, top_k)
    output_BTD = _einsum("BTF,FD->BTD", hidden_BTF * _by_neuron(weights_BTE, label_F), down_FD)
    energies_BTE = _energies(hidden_BTF, dense_down_FD, members_EF)
    least_BT1 = jax.lax.top_k(energies_BTE, top_k)[0][..., -1:]
    chosen_BTE = weights_BTE > 0
    recall = jnp.mean(jnp.sum(chosen_BTE & (energies_BTE >= least_BT1), axis=-1)) / top_k
    return jnp.sum((output_BTD - y_BTD) ** 2), jnp.sum(y_BTD**2), recall, jnp.mean(chosen_BTE, axis=(0, 1))
