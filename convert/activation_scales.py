"""Static FP8 scales of activations: the largest that calibration text brings, of each linear map's input, keys, values.

The model runs over the text layer by layer. An expert is judged by its own tokens alone; one that saw fewer than
`FEWEST_TOKENS` gets the largest of its layer's experts, and is named in the layer's figures.

B batch, T sequence, D embed, E experts, C top-k, R = T·C rows sorted by expert.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.layerwise import LayerwiseModel, block_graph, kind_of
from convert.streaming import Figures
from nemoe_jax.checkpoints.fp8 import MAX
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.kernels.grouped_matmul.dispatch import grouped_matmul
from nemoe_jax.model.attention import Context, attend
from nemoe_jax.model.ffn import SwiGLU
from nemoe_jax.model.layers import rms_norm
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import Tree, declare, leaves

FEWEST_TOKENS = 32  # by which an expert's inputs are judged
KEYS, VALUES = "keys", "values"
Largest = dict[str, jax.Array]  # {path within a block, "keys" or "values": max |activation|, of experts (E,)}


class ActivationScales:
    """The model over calibration text; layers come in ascending order."""

    def __init__(self, source: Checkpoint, batches: Sequence[np.ndarray]):
        """Takes tokens (B, T + 1), as `calibration_batches` gives them."""
        self._layers = LayerwiseModel(source)
        self._streams = [self._layers.embed(tokens_BS[:, :-1]) for tokens_BS in batches]
        self._passed = -1  # the last layer

    def measure(self, layer: int) -> tuple[dict[str, float], Figures]:
        """Scales by checkpoint key of the weight whose input it is (those of keys and values: of `KEYS`, `VALUES`).

        Returns:
            The scales, and figures for the manifest: which experts saw too few tokens.
        """
        config, kind = self._layers.config, kind_of(self._layers.config, layer)
        weights = self._layers.weights(layer)
        largest: Largest = {}
        tokens_E = np.zeros(max(config.experts, 1), np.int64)
        for number, x_BTD in enumerate(self._streams):
            found, counts_E = _largest(config, kind, weights, x_BTD)
            largest = {name: jnp.maximum(value, largest.get(name, 0)) for name, value in found.items()}
            tokens_E = tokens_E + np.asarray(counts_E)
            middle_BTD, normed_BTD = self._layers.attend(layer, weights, x_BTD)
            self._streams[number] = middle_BTD + self._layers.feed_forward(layer, weights, normed_BTD)
            jax.block_until_ready(self._streams[number])  # one program at a time: see `in_turn`
        self._passed = layer
        few = [] if kind == "dense" else np.flatnonzero(tokens_E < FEWEST_TOKENS).tolist()
        scales = {}
        specs = leaves(declare(config)["blocks"][kind])
        for name, value in largest.items():
            amax_E = np.array(value, np.float32, ndmin=1)
            if len(amax_E) > 1:
                amax_E[few] = amax_E.max()
            scale_E = np.where(amax_E > 0, amax_E / MAX, 1.0)
            for expert, scale in enumerate(scale_E):
                key = specs[name].key_of(layer, expert) if name in specs else name
                scales[key] = float(scale)
        return scales, {
            "experts_with_few_tokens": {str(expert): int(tokens_E[expert]) for expert in few}
        } if few else {}

    def pass_by(self, layer: int) -> None:
        """Goes on behind a layer that an earlier run has written."""
        if self._passed != layer:
            self.measure(layer)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _largest(config: ModelConfig, kind: str, weights: Tree, x_BTD: jax.Array) -> tuple[Largest, jax.Array]:
    """The largest activations of a batch, and how many of its tokens each expert sees."""
    block = nnx.merge(block_graph(config, kind), weights)
    positions = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    normed_BTD = rms_norm(x_BTD, weights["attn_norm"], config.norm_eps)
    q, k, v = block.attn.queries_keys_values(normed_BTD, Context(positions, None))
    mixed = attend(q, k, v, None, config.sliding_window)
    largest = {f"attn/{name}": _amax(normed_BTD) for name in "qkv"} | {"attn/o": _amax(mixed)}
    largest |= {KEYS: _amax(k), VALUES: _amax(v)}
    _, normed_BTD, *_ = block.attend(x_BTD, Context(positions, None), None, {})
    if isinstance(block.ffn, SwiGLU):
        return largest | _of_dense("ffn", weights["ffn"], normed_BTD), jnp.zeros(1, jnp.int32)
    if config.shared_ffn:
        largest |= _of_dense("ffn/shared", weights["ffn"]["shared"], normed_BTD)
    _, chosen_BTC, _ = block.ffn.route(normed_BTD)
    order_R = jnp.argsort(chosen_BTC.reshape(-1))
    expert_R = chosen_BTC.reshape(-1)[order_R]
    sizes_E = jnp.bincount(expert_R, length=config.experts).astype(jnp.int32)
    x_RD = normed_BTD.reshape(-1, normed_BTD.shape[-1])[order_R // config.top_k]
    gate_RF, up_RF = (grouped_matmul(x_RD, weights["ffn"][name], sizes_E) for name in ("gate", "up"))

    def of_experts(values_R: jax.Array) -> jax.Array:
        largest_R = jnp.abs(values_R).max(axis=-1)
        return jax.ops.segment_max(largest_R, expert_R, config.experts).clip(0)  # -inf without tokens

    inputs_E = of_experts(x_RD)
    down_E = of_experts(jax.nn.silu(gate_RF) * up_RF)  # others multiply by the routing weight after `down`
    return largest | {"ffn/gate": inputs_E, "ffn/up": inputs_E, "ffn/down": down_E}, sizes_E


def _of_dense(path: str, ffn: Tree, normed_BTD: jax.Array) -> Largest:
    hidden_BTF = jax.nn.silu(normed_BTD @ ffn["gate"]) * (normed_BTD @ ffn["up"])
    return {f"{path}/gate": _amax(normed_BTD), f"{path}/up": _amax(normed_BTD), f"{path}/down": _amax(hidden_BTF)}


def _amax(array: jax.Array) -> jax.Array:
    return jnp.abs(array).max()
