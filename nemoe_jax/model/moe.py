"""The sparse Mixture-of-Experts layer: a router, its chosen experts, and an optional gated shared expert.

What the experts of one device do with its tokens is in expert_ffn.py; how tokens and experts that lie on different
devices come together, in expert_parallel.py.

B batch, T tokens, D embed, E experts, C top-k.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nemoe_jax.adapters.multi_lora import index_of_tokens, with_index
from nemoe_jax.model.decode_weights import LayerSlice, decode_experts
from nemoe_jax.model.expert_ffn import apply_experts
from nemoe_jax.model.expert_parallel import run_over_mesh
from nemoe_jax.model.ffn import SwiGLU
from nemoe_jax.model.layers import NO_ADAPTERS, Adapters, SpecModule
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.fp8_weight import FakeQuantized
from nemoe_jax.spec.mesh import spans_devices
from nemoe_jax.spec.schema import Tree


class Routing(NamedTuple):
    """What the router did, for losses and logs; of one layer, or stacked over layers."""

    load_E: jax.Array  # share of the tokens' choices that went to each expert; sums to 1
    gate_E: jax.Array  # mean routing weight of each expert, 0 where it is not chosen
    balance_loss: jax.Array  # E · Σ load · mean probability; 1 when balanced (Fedus et al., 2021)
    z_loss: jax.Array  # mean of logsumexp(logits)² (Zoph et al., 2022)
    entropy: jax.Array  # mean entropy of the router's probabilities, in nats; ln E where they are even


class MoE(SpecModule):
    def __init__(self, config: ModelConfig, specs: Tree):
        super().__init__(specs)
        self.top_k, self.normalize = config.top_k, config.normalize_top_k
        self.expert_specs = tuple((name, specs[name]) for name in ("gate", "up", "down"))
        self.shared = SwiGLU(specs["shared"]) if config.shared_ffn else None

    def __call__(
        self,
        x_BTD: jax.Array,
        adapters: Adapters = NO_ADAPTERS,
        segments_BT: jax.Array | None = None,
        router_bias_E: jax.Array | None = None,
        whole_groups: bool = False,
    ) -> tuple[jax.Array, Routing]:
        """(B, T, D) -> (B, T, D) and what the router did with the tokens that are no padding (segment 0)."""
        weights_BTC, chosen_BTC, routing = self.route(x_BTD, adapters, segments_BT, router_bias_E, whole_groups)
        experts = {name: self.weight(name) for name, _ in self.expert_specs}
        own_adapters = {name: adapters[name] for name in experts if name in adapters}
        y_BTD = self._compute(x_BTD, weights_BTC, chosen_BTC, experts, own_adapters)
        if self.shared is not None:
            share = jax.nn.sigmoid(self.project("shared_gate", x_BTD, adapters))
            y_BTD += share * self.shared(x_BTD, adapters.get("shared", NO_ADAPTERS))
        return y_BTD, routing

    def route(
        self,
        x_BTD: jax.Array,
        adapters: Adapters = NO_ADAPTERS,
        segments_BT: jax.Array | None = None,
        router_bias_E: jax.Array | None = None,
        whole_groups: bool = False,
    ) -> tuple[jax.Array, jax.Array, Routing]:
        """Routing weights (B, T, C) in x's dtype, the chosen experts (B, T, C), and statistics."""
        # float32: bfloat16 ties change which experts are chosen
        logits_BTE = self.project("router", x_BTD.astype(jnp.float32), adapters)
        weights_BTC, chosen_BTC = top_k_weights(logits_BTE, self.top_k, self.normalize, router_bias_E)
        if whole_groups:
            weights_BTC = with_gradient_of_groups(weights_BTC, logits_BTE, chosen_BTC)
        return (
            weights_BTC.astype(x_BTD.dtype),
            chosen_BTC,
            _statistics(logits_BTE, weights_BTC, chosen_BTC, segments_BT),
        )

    def _compute(
        self, x_BTD: jax.Array, weights_BTC: jax.Array, chosen_BTC: jax.Array, experts: Tree, adapters: Adapters
    ) -> jax.Array:
        """The weighted sum of the chosen experts' outputs, over the ambient mesh where there is one."""
        index_BT = index_of_tokens(adapters, x_BTD.shape[1])
        adapters = with_index(adapters, None)  # the tokens take it along
        if isinstance(experts["gate"], FakeQuantized):
            experts = {name: of.with_adapter(adapters.get(name), 1, 1, x_BTD.dtype) for name, of in experts.items()}
            adapters = NO_ADAPTERS
        if isinstance(experts["gate"], LayerSlice):
            return decode_experts(x_BTD, weights_BTC, chosen_BTC, experts, adapters, index_BT)
        mesh = jax.sharding.get_abstract_mesh()
        if not spans_devices(mesh):
            return apply_experts(x_BTD, weights_BTC, chosen_BTC, experts, adapters, 0, index_BT)
        specs = dict(self.expert_specs)
        return run_over_mesh(x_BTD, weights_BTC, chosen_BTC, experts, adapters, specs, mesh, index_BT)


def top_k_weights(
    logits_BTE: jax.Array, top_k: int, normalize: bool = True, bias_E: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Routing weights (B, T, C) and the chosen experts (B, T, C).

    Args:
        normalize: softmax over the chosen experts' logits, so that the weights sum to 1; else over all experts'.
        bias_E: added to the logits for the choice, and not for the weights (Wang et al., 2024, arXiv 2408.15664).
    """
    top_BTC, chosen_BTC = lax.top_k(logits_BTE if bias_E is None else logits_BTE + bias_E, top_k)
    if bias_E is not None:
        top_BTC = jnp.take_along_axis(logits_BTE, chosen_BTC, axis=-1)
    if normalize:
        return jax.nn.softmax(top_BTC), chosen_BTC
    return jnp.take_along_axis(jax.nn.softmax(logits_BTE), chosen_BTC, axis=-1), chosen_BTC


def with_gradient_of_groups(weights_BTC: jax.Array, logits_BTE: jax.Array, chosen_BTC: jax.Array) -> jax.Array:
    """The same routing weights, with a gradient for router rows that a group of experts has in common.

    Such experts weigh 1/C each, whatever their row is, so that it would learn nothing. Here the output counts as if it
    were times the chosen experts' part of all experts' probability, over that part as it is: the gradient is that of a
    top-1 choice among groups (Fedus et al., 2021), scaled.
    """
    share_BT1 = jnp.take_along_axis(jax.nn.softmax(logits_BTE), chosen_BTC, axis=-1).sum(-1, keepdims=True)
    return weights_BTC * (share_BT1 / lax.stop_gradient(share_BT1))


def _statistics(
    logits_BTE: jax.Array, weights_BTC: jax.Array, chosen_BTC: jax.Array, segments_BT: jax.Array | None
) -> Routing:
    """Means over the tokens that are no padding."""
    counts_BT = jnp.ones(logits_BTE.shape[:2]) if segments_BT is None else (segments_BT > 0).astype(jnp.float32)
    tokens = jnp.maximum(counts_BT.sum(), 1.0)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.tensordot(counts_BT, values, 2) / tokens

    experts = logits_BTE.shape[-1]
    log_probabilities_BTE = jax.nn.log_softmax(logits_BTE)
    probabilities_BTE = jnp.exp(log_probabilities_BTE)
    chosen_BTCE = jax.nn.one_hot(chosen_BTC, experts)
    load_E = lax.stop_gradient(mean(jnp.sum(chosen_BTCE, axis=-2) / chosen_BTC.shape[-1]))
    return Routing(
        load_E=load_E,
        gate_E=lax.stop_gradient(mean(jnp.einsum("BTC,BTCE->BTE", weights_BTC, chosen_BTCE))),
        balance_loss=experts * jnp.sum(load_E * mean(probabilities_BTE)),
        z_loss=mean(jax.nn.logsumexp(logits_BTE, axis=-1) ** 2),
        entropy=mean(-jnp.sum(probabilities_BTE * log_probabilities_BTE, axis=-1)),
    )
