"""What the experts of a layer give each token: routing weights, and the products of their outputs.

With token t's Gram matrix G_t = [⟨f_e, f_e'⟩] of the experts' outputs, the squared distance of two mixtures of them is
d_tᵀ G_t d_t for the difference d_t of the routing weights: whoever compares choices of experts, or routers, runs the
experts once.

B batch, T tokens (or sequence), D embed, F expert_ffn, E experts, L MoE layers, S subsets.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.router_ties import find_ties
from nemoe_jax.spec.schema import Tree, declare

POSITIONS_AT_ONCE = 32  # of each sequence of a batch: bounds the memory that all experts' outputs take

Groups = list[list[int]]  # the experts of each

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def expert_products(ffn: Tree, x_BTD: jax.Array, against_BTD: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """Of a layer on its normalized input: router logits (tokens, E), ⟨f_e, f_e'⟩ (tokens, E, E) for the experts'
    outputs f, all of them for every token, and ⟨f_e, against⟩ (tokens, E) where that is given.
    """

    def position(pair):
        x_BD, against_BD = pair
        hidden_BEF = jax.nn.silu(einsum("BD,EDF->BEF", x_BD, ffn["gate"])) * einsum("BD,EDF->BEF", x_BD, ffn["up"])
        output_BED = einsum("BEF,EFD->BED", hidden_BEF, ffn["down"])
        logits_BE = einsum("BD,DE->BE", x_BD, ffn["router"])
        gram_BEE = einsum("BED,BGD->BEG", output_BED, output_BED)
        if against_BD is None:
            return logits_BE, gram_BEE
        return logits_BE, gram_BEE, einsum("BED,BD->BE", output_BED, against_BD)

    pairs = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (x_BTD, against_BTD))
    results = jax.lax.map(position, pairs, batch_size=POSITIONS_AT_ONCE)
    return tuple(jnp.moveaxis(result, 1, 0).reshape(-1, *result.shape[2:]) for result in results)


def routing(config: ModelConfig, logits_TE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every expert's routing weight, 0 where it is not chosen, and whether it is: (T, E) each."""
    weights_TE1, chosen_TE1 = routing_within(config, logits_TE, jnp.ones((logits_TE.shape[-1], 1), bool))
    return weights_TE1[..., 0], chosen_TE1[..., 0]


def routing_within(config: ModelConfig, logits_TE: jax.Array, member_ES: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`routing` where only the members of a subset may be chosen, for each of S subsets: (T, E, S).

    A member is chosen if fewer than top-k members come before it. Counting them is a matrix product; sorting the logits
    of each subset anew would take many times as long.
    """
    rank_TE = jnp.argsort(jnp.argsort(-logits_TE, stable=True))  # of equal logits the first expert's is higher
    before_TEE = (rank_TE[:, None, :] < rank_TE[:, :, None]).astype(jnp.float32)
    chosen_TES = member_ES & (jnp.einsum("TEG,GS->TES", before_TEE, member_ES.astype(jnp.float32)) < config.top_k - 0.5)
    share_TES = jnp.where(chosen_TES if config.normalize_top_k else member_ES, logits_TE[..., None], -jnp.inf)
    return jnp.where(chosen_TES, jax.nn.softmax(share_TES, axis=1), 0), chosen_TES


def moe_layers(config: ModelConfig) -> range:
    """The numbers of the MoE layers."""
    return range(config.dense_layers, config.layers)


def stored_routers(source: Checkpoint) -> np.ndarray:
    """All routers of a checkpoint, (L, D, E) float32."""
    spec = declare(source.config)["blocks"]["moe"]["ffn"]["router"]
    return np.stack([np.asarray(source.view(key), np.float32).T for _, key in spec.tensors()])


def groups_of_experts(source: Checkpoint) -> dict[int, Groups]:
    """{MoE layer: its groups of experts that share a router row and are chosen together, or each expert alone}."""
    ties = find_ties(stored_routers(source), source.config.top_k)
    alone = [[expert] for expert in range(source.config.experts)]
    return {layer: ties.groups(row) if ties else alone for row, layer in enumerate(moe_layers(source.config))}
