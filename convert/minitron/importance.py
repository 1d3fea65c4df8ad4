"""How strongly text excites each channel, neuron and head of a model, and needs each layer: what pruning sorts by.

A neuron's score is √(Σ over sequences of (mean over tokens of |h|)²), h its activation that `down` reads. An expert's h
counts with the weight that the router gave the token (0 where it was not chosen), a shared expert's with its gate: that
is what reaches the output. A channel's score is the same of the outputs of both norms of every layer, summed.
(Muralidharan et al., 2024, arXiv 2407.14679: mean over the sequence, L2 over the batch.) A head's score is that of the
norms of its outputs before `o`. A layer's is how far it turns the stream, 1 − the mean cosine of what goes in and comes
out (Men et al., 2024, arXiv 2403.03853), or the loss of the model without it.

B batch, T sequence, D embed, F neurons, E experts, N heads, L layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.experts.outputs import routing
from convert.layerwise import LayerwiseModel, block_graph, feed_forward, hidden, kind_of
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.model.attention import Attention, Context, attend
from nemoe_jax.model.layers import project, rms_norm
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import Tree, declare
from nemoe_jax.utils.progress import progress_bar


@dataclasses.dataclass
class Scores:
    """What a pass over the text finds."""

    hidden_D: np.ndarray
    neurons: list[dict[str, np.ndarray]]  # of each layer: {axis: (F,), or (E, F) of experts, or (N,) of heads}
    shares_D: dict[str, np.ndarray]  # {checkpoint key of a norm: mean share of its input's energy in each channel}
    layers_L: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))


class Scorer:
    """The pass over the calibration text."""

    def __init__(self, source: Checkpoint, batches: list[np.ndarray], heads: bool = False, by_loss: bool = False):
        """Batches are tokens (B, T + 1); `heads`: score those, too; `by_loss`: layers by the loss without them."""
        self.stream, self.config = LayerwiseModel(source), source.config
        self.batches, self.heads, self.by_loss = batches, heads, by_loss
        self._x = [self.stream.embed(tokens_BS[:, :-1]) for tokens_BS in batches]

    def blank(self) -> Scores:
        """Zeros in place of scores, for a dry run."""
        specs = declare(self.config)
        neurons = [
            {axis: np.zeros(shape) for axis, shape in _neuron_shapes(specs["blocks"][kind]["ffn"]).items()}
            | ({"heads": np.zeros(self.config.heads)} if self.heads else {})
            for kind in (kind_of(self.config, layer) for layer in range(self.config.layers))
        ]
        return Scores(np.zeros(self.config.hidden), neurons, {}, np.zeros(self.config.layers))

    def all_layers(self) -> Scores:
        """Every score.

        Raises:
            UserError: a layer's activations are not finite.
        """
        specs, hidden_D, neurons, shares_D = declare(self.config), np.zeros(self.config.hidden), [], {}
        turned, without = [], list[list[jax.Array]]()  # of each layer before: the streams of the model without it
        with progress_bar() as bar:
            for layer in bar.track(range(self.config.layers), description="scoring"):
                weights, before = self.stream.weights(layer), list(self._x)
                sums = self.layer(layer, weights)
                if self.by_loss:
                    without = [[self.stream.through(layer, weights, x_BTD) for x_BTD in streams] for streams in without]
                    without.append(before)
                if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(sums)):
                    directory = self.stream.source.directory
                    raise UserError(f"{directory}: layer {layer}: activations on the calibration text are not finite")
                neurons.append({axis: _roots(axis, total) for axis, total in sums["neurons"].items()})
                turned.append(float(sums["turned"]) / sum(tokens[:, 1:].size for tokens in self.batches))
                for name, (activity_D, share_D) in sums["norms"].items():
                    hidden_D += np.sqrt(activity_D)
                    spec = specs["blocks"][kind_of(self.config, layer)][name]
                    shares_D[spec.key_of(layer)] = share_D / share_D.sum()
        share_D = np.sum([_shares(x_BTD) for x_BTD in self._x], axis=0, dtype=np.float64)
        losses = [self.stream.next_token(streams, self._x, self.batches, 0.0).loss for streams in without]
        shares_D |= {specs["norm"].key: share_D / share_D.sum()}
        return Scores(hidden_D, neurons, shares_D, np.array(losses if self.by_loss else turned))

    def layer(self, layer: int, weights: Tree | None = None) -> Tree:
        """The sums of one layer over all batches, float64; the streams go on behind it."""
        weights, total = self.stream.weights(layer) if weights is None else weights, None
        kind = kind_of(self.config, layer)
        for number, x_BTD in enumerate(self._x):
            middle_BTD, normed_BTD = self.stream.attend(layer, weights, x_BTD)
            with jax.set_mesh(self.stream.mesh):
                self._x[number], sums = _score(self.config, kind, self.heads, weights, x_BTD, middle_BTD, normed_BTD)
            sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        assert total is not None  # there is always a batch
        return total


def _neuron_shapes(ffn: Tree) -> dict[str, tuple[int, ...]]:
    """{axis: (F,), or (E, F) of experts} of a layer's FFN."""
    downs = [ffn["down"], *([ffn["shared"]["down"]] if "shared" in ffn else [])]
    return {down.contracted[0]: down.shape[1:-1] for down in downs}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(config: ModelConfig, kind: str, heads: bool, weights: Tree, x_BTD, middle_BTD, normed_BTD):
    """The stream after the layer, and the sums that its scores are made of."""
    ffn = weights["ffn"]
    sums: Tree = {
        "norms": {
            "attn_norm": (_squares(rms_norm(x_BTD, weights["attn_norm"], config.norm_eps)), _shares(x_BTD)),
            "ffn_norm": (_squares(normed_BTD), _shares(middle_BTD)),
        }
    }
    if kind == "dense":
        sums["neurons"] = {"ffn": _squares(hidden(ffn, normed_BTD))}
    else:
        sums["neurons"] = {"expert_ffn": _expert_squares(config, ffn, normed_BTD)}
        if config.shared_ffn:
            gate_BT1 = jax.nn.sigmoid(project(normed_BTD, ffn["shared_gate"], 1, None))
            sums["neurons"]["shared_ffn"] = _squares(gate_BT1 * hidden(ffn["shared"], normed_BTD))
    if heads:
        sums["neurons"]["heads"] = _squares(_head_norms(config, kind, weights, x_BTD))
    after_BTD = middle_BTD + feed_forward(config, kind, weights, normed_BTD)
    norms_BT = jnp.linalg.norm(x_BTD, axis=-1) * jnp.linalg.norm(after_BTD, axis=-1)
    sums["turned"] = jnp.sum(
        1 - jnp.sum(x_BTD * after_BTD, axis=-1) / jnp.maximum(norms_BT, jnp.finfo(jnp.float32).tiny)
    )
    return after_BTD, sums


def _head_norms(config: ModelConfig, kind: str, weights: Tree, x_BTD: jax.Array) -> jax.Array:
    """The norm of each head's output, (B, T, N)."""
    attention = nnx.merge(block_graph(config, kind), weights).attn
    assert isinstance(attention, Attention)
    positions = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    normed_BTD = rms_norm(x_BTD, weights["attn_norm"], config.norm_eps)
    q, k, v = attention.queries_keys_values(normed_BTD, Context(positions, None))
    return jnp.linalg.norm(attend(q, k, v, None, config.sliding_window), axis=-1)


def _expert_squares(config: ModelConfig, ffn: Tree, x_BTD: jax.Array) -> jax.Array:
    """(2, E, F): each expert's sums over the tokens that chose it, by their routing weights, and over all tokens."""
    logits_BTE = project(x_BTD, ffn["router"], 1, None)
    weights_TE, _ = routing(config, logits_BTE.reshape(-1, config.experts))

    def of_expert(expert):
        maps, weights_T = expert
        hidden_BTF = hidden(maps, x_BTD)
        return _squares(weights_T.reshape(*x_BTD.shape[:2], 1) * hidden_BTF), _squares(hidden_BTF)

    maps = {name: ffn[name] for name in ("gate", "up")}
    return jnp.stack(jax.lax.map(of_expert, (maps, weights_TE.T)))


def _roots(axis: str, total: np.ndarray) -> np.ndarray:
    """Scores from sums; an expert that no token chose is scored on all of them."""
    if axis == "expert_ffn":
        chosen_EF, all_EF = total
        total = np.where(chosen_EF.any(axis=1, keepdims=True), chosen_EF, all_EF)
    return np.sqrt(total)


def _squares(x_BTF: jax.Array) -> jax.Array:
    """Σ_B (mean_T |x|)², (F,)."""
    return jnp.sum(jnp.abs(x_BTF).mean(axis=1) ** 2, axis=0)


@jax.jit
def _shares(x_BTD: jax.Array) -> jax.Array:
    """Σ_BT x² / Σ_D x², (D,): every token counts alike, however large its stream is."""
    square_BTD = x_BTD**2
    total_BT1 = jnp.maximum(square_BTD.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return jnp.sum(square_BTD / total_BT1, axis=(0, 1))
