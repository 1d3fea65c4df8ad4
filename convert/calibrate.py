"""What calibration text adds to a carve: the activations that each layer's FFN sees, and the output scale they ask for.

B batch, T sequence, D embed, E experts, F expert_ffn.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nemoe_jax.attention import Context
from nemoe_jax.checkpoint import Checkpoint
from nemoe_jax.config import ModelConfig
from nemoe_jax.layers import NO_ADAPTERS
from nemoe_jax.schema import Tree, declare, leaves, unflatten
from nemoe_jax.text import find_files, spaced_batches, tokenize
from nemoe_jax.tokenizer import load_tokenizer
from nemoe_jax.transformer import Block

SEQUENCE_LENGTH = 256
BATCH = 8
RIDGE = 1e-3  # of the mean diagonal: pulls an expert that is seldom chosen towards the common scale


class DenseStream:
    """A dense model run layer by layer over calibration text, one layer's weights in memory at a time."""

    def __init__(self, source: Checkpoint, texts: Sequence[str], tokens: int):
        """Reads and tokenises the text; evenly spaced windows of about `tokens` tokens in all.

        Raises:
            UserError: no text, too little of it, or no tokenizer in the source.
        """
        self.source, self.config = source, source.config
        stream = tokenize(find_files(texts), load_tokenizer(source.directory), "tokenising calibration text")
        length = min(SEQUENCE_LENGTH, self.config.context)
        batches = spaced_batches(stream, length, BATCH, max(tokens // (BATCH * length), 1))
        table = source.view(declare(self.config)["embed"].key)
        self.streams = [jnp.asarray(table[np.asarray(tokens_BT[:, :-1])], jnp.float32) for tokens_BT, _ in batches]
        self.layer = 0

    def ffn_inputs(self, layer: int) -> list[jax.Array]:
        """The normalised activations (B, T, D), one array a batch, that the FFN of that layer reads.

        Layers are visited in ascending order; skipped ones (of a resumed job) are run through.
        """
        while True:
            weights = self._layer_weights(self.layer)
            results = [_dense_layer(self.config, weights, x_BTD) for x_BTD in self.streams]
            self.streams = [after for _, after in results]
            self.layer += 1
            if self.layer > layer:
                return [normed for normed, _ in results]

    def _layer_weights(self, layer: int) -> Tree:
        block = declare(self.config)["blocks"]["dense"]
        return unflatten(
            {
                path: jnp.asarray(
                    self.source.read(spec, (slice(layer, layer + 1), *map(slice, spec.shape[1:])), np.float32)[0]
                )
                for path, spec in leaves(block).items()
            }
        )


@functools.partial(jax.jit, static_argnums=0)
def _dense_layer(config: ModelConfig, weights: Tree, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what the FFN reads, the stream after the layer)."""
    graph = nnx.split(nnx.eval_shape(lambda: Block(config, declare(config)["blocks"]["dense"])))[0]
    block = nnx.merge(graph, weights)
    positions = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    middle, normed, _ = block.attend(x_BTD, Context(positions, None, None), None, NO_ADAPTERS)
    return normed, middle + block.feed_forward(normed)[0]


def least_squares_scale(
    inputs: Sequence[jax.Array],
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    router_DE: jax.Array,
    top_k: int,
) -> jax.Array:
    """The factor of each expert's `down`, (E,), with which the mixture comes nearest to the dense FFN's output.

    Minimises Σ_tokens ‖Σ_e s_e·p_te·f_e(x_t) − Σ_e f_e(x_t)‖² with a small ridge towards the common factor, where p are
    the routing weights and the experts f_e together are the dense FFN.
    """
    experts = gate_EDF.shape[0]
    gram_EE, moment_E = jnp.zeros((experts, experts)), jnp.zeros(experts)
    for x_BTD in inputs:
        for x_TD in x_BTD:  # one sequence at a time: every expert's output of every token is held
            gram, moment = _moments(x_TD, gate_EDF, up_EDF, down_EFD, router_DE, top_k)
            gram_EE, moment_E = gram_EE + gram, moment_E + moment
    common = moment_E.sum() / gram_EE.sum()
    ridge = RIDGE * jnp.trace(gram_EE) / experts
    return jnp.linalg.solve(gram_EE + ridge * jnp.eye(experts), moment_E + ridge * common)


@functools.partial(jax.jit, static_argnames="top_k")
def _moments(x_TD, gate_EDF, up_EDF, down_EFD, router_DE, top_k):
    precision = jax.lax.Precision.HIGHEST
    einsum = functools.partial(jnp.einsum, precision=precision)
    hidden_ETF = jax.nn.silu(einsum("TD,EDF->ETF", x_TD, gate_EDF)) * einsum("TD,EDF->ETF", x_TD, up_EDF)
    outputs_ETD = einsum("ETF,EFD->ETD", hidden_ETF, down_EFD)
    top_TC, chosen_TC = jax.lax.top_k(einsum("TD,DE->TE", x_TD, router_DE), top_k)
    one_hot_TCE = jax.nn.one_hot(chosen_TC, gate_EDF.shape[0])
    weights_TE = einsum("TC,TCE->TE", jax.nn.softmax(top_TC), one_hot_TCE)
    weighted_ETD = outputs_ETD * weights_TE.T[..., None]
    gram_EE = einsum("ETD,GTD->EG", weighted_ETD, weighted_ETD)
    return gram_EE, einsum("ETD,TD->E", weighted_ETD, outputs_ETD.sum(0))
