"""The decoder-only transformer: embedding, runs of stacked blocks that are scanned over, final norm, logits.

    logits_BTV = forward(config, params, tokens_BT).logits

or in two parts, so that a loss can go through the vocabulary in chunks of tokens:

    x_BTD = hidden(config, params, tokens_BT).x_BTD
    logits_BTV = logits(config, params, x_BTD)

B batch, T sequence, D embed, V vocabulary, L layers, S cache slots, E experts, R rank.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from nemoe_jax.adapters.lora import Adapter, factors
from nemoe_jax.adapters.multi_lora import mask_ranks
from nemoe_jax.kernels.backend import target_platform
from nemoe_jax.model.attention import Attention, Context
from nemoe_jax.model.decode_weights import LayerSlice, use_inplace_weights
from nemoe_jax.model.embedding import embed_tokens
from nemoe_jax.model.ffn import SwiGLU
from nemoe_jax.model.kv_cache import KVCache, LayerCache
from nemoe_jax.model.layers import NO_ADAPTERS, Adapters, SpecModule, project, rms_norm
from nemoe_jax.model.moe import MoE, Routing
from nemoe_jax.model.rope import rope_cos_sin
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.fp8_weight import FakeQuantized, Fp8Weight
from nemoe_jax.spec.mesh import spans_devices
from nemoe_jax.spec.schema import ParamSpec, Tree, declare, leaves, map_with_path
from nemoe_jax.spec.sharding import constrain_tokens, gathered, partition_spec, used_spec


class HiddenOutput(NamedTuple):
    """What the blocks give: all of a forward pass but the head."""

    x_BTD: jax.Array  # after the final norm
    cache: KVCache | None
    routing: (
        Routing | None
    )  # load and gate (L, E), losses and entropy averaged over the MoE layers; None for a dense model
    outputs: dict[str, jax.Array]  # (L, B, T, D) of those parts of the layers whose outputs were to be kept


class Output(NamedTuple):
    """What a forward pass gives."""

    logits: jax.Array  # (B, T, V) float32
    cache: KVCache | None
    routing: Routing | None  # as in Hidden


class Block(SpecModule):
    def __init__(self, config: ModelConfig, specs: Tree):
        super().__init__(specs)
        self.eps = config.norm_eps
        self.attn = Attention(config, specs["attn"])
        self.ffn = MoE(config, specs["ffn"]) if "router" in specs["ffn"] else SwiGLU(specs["ffn"])

    def attend(
        self, x_BTD: jax.Array, context: Context, cache: LayerCache | None, adapters: Adapters
    ) -> tuple[jax.Array, jax.Array, LayerCache | None, jax.Array]:
        """The stream after attention, its normalized copy that the FFN reads, the cache, and what attention added."""
        normed = rms_norm(x_BTD, self.weight("attn_norm"), self.eps)
        y_BTD, cache = self.attn(normed, context, cache, adapters.get("attn", NO_ADAPTERS))
        x_BTD = constrain_tokens(x_BTD + y_BTD)
        return x_BTD, rms_norm(x_BTD, self.weight("ffn_norm"), self.eps), cache, y_BTD

    def feed_forward(
        self, normed_BTD: jax.Array, adapters: Adapters = NO_ADAPTERS, context: Context | None = None
    ) -> tuple[jax.Array, Routing | None]:
        """What the FFN adds to the stream, and its routing where it is an MoE FFN."""
        if isinstance(self.ffn, MoE):
            training = () if context is None else (context.segments_BT, context.router_bias_E, context.whole_groups)
            return self.ffn(normed_BTD, adapters, *training)
        return self.ffn(normed_BTD, adapters), None

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LayerCache | None, adapters: Adapters
    ) -> tuple[jax.Array, LayerCache | None, Routing | None, dict[str, jax.Array]]:
        """(B, T, D) -> (B, T, D), the layer's cache, its routing where it is an MoE layer, and what its parts added."""
        x_BTD, normed, cache, attended_BTD = self.attend(x_BTD, context, cache, adapters)
        own = adapters.get("ffn", NO_ADAPTERS)
        y_BTD, routing = self.feed_forward(normed, own, context)
        return constrain_tokens(x_BTD + y_BTD), cache, routing, {"attention": attended_BTD, "ffn": y_BTD}


class Transformer(SpecModule):
    """Its state is the schema's tree: any nested dict of arrays with those paths can be merged into it."""

    def __init__(self, config: ModelConfig):
        specs = declare(config)
        super().__init__(specs)
        self.config, self.eps = config, config.norm_eps
        self.blocks = nnx.Dict({kind: Block(config, block) for kind, block in specs["blocks"].items()})

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        adapters: Adapters = NO_ADAPTERS,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: KVCache | None = None,
        num_new_tokens_B: jax.Array | None = None,
        remat: bool = False,
        router_bias_LE: jax.Array | None = None,
        whole_groups: bool = False,
        keep: Sequence[str] = (),
    ) -> HiddenOutput:
        if positions is None:
            positions = jnp.arange(tokens_BT.shape[1])[None] + (0 if cache is None else cache.length_B[:, None])
            positions = jnp.broadcast_to(positions, tokens_BT.shape)
        counted = None
        if num_new_tokens_B is not None:
            counted = jnp.arange(tokens_BT.shape[1]) < num_new_tokens_B[:, None]
        context = Context(positions, segments, rope_cos_sin(self.config, positions, counted), None, whole_groups)
        spec = declare(self.config)["embed"]
        x_BTD = embed_tokens(spec, self.weight("embed"), tokens_BT, adapters.get("embed"))
        held = None
        if cache is not None:
            held = LayerCache(cache.k, cache.v, cache.table_BM, jnp.int32(0), num_new_tokens_B)
        routings: list[Routing] = []
        outputs: list[dict[str, jax.Array]] = []
        for kind, block in self.blocks.items():
            run_adapters = adapters.get("blocks", NO_ADAPTERS).get(kind, NO_ADAPTERS)
            specs, bias_LE = declare(self.config)["blocks"][kind], router_bias_LE if kind == "moe" else None
            x_BTD, held, (routing, kept) = _scan_run(
                block, specs, x_BTD, context, held, run_adapters, remat, bias_LE, keep
            )
            outputs.append(kept)
            if routing is not None:
                routings.append(routing)
        x_BTD = rms_norm(x_BTD, self.weight("norm"), self.eps)
        if cache is not None and held is not None:
            more = tokens_BT.shape[1] if num_new_tokens_B is None else num_new_tokens_B
            cache = KVCache(held.k, held.v, cache.table_BM, cache.length_B + more)
        routing = None
        if routings:
            routing = jax.tree.map(lambda *layers: jnp.concatenate(layers), *routings)
            routing = Routing(*routing[:2], *(statistic.mean() for statistic in routing[2:]))
        together = {name: jnp.concatenate([run[name] for run in outputs]) for name in keep}
        return HiddenOutput(x_BTD, cache, routing, together)


def _scan_run(
    block: Block,
    specs: Tree,
    x_BTD: jax.Array,
    context: Context,
    cache: LayerCache | None,
    adapters: Adapters,
    remat: bool,
    router_bias_LE: jax.Array | None,
    keep: Sequence[str],
) -> tuple[jax.Array, LayerCache | None, tuple[Routing | None, dict[str, jax.Array]]]:
    """A run of stacked layers, one after another: compiled once whatever their number.

    The cache of all layers goes along, and each layer writes its own part where it lies.
    """
    graph, state = nnx.split(block)
    stacked = nnx.to_pure_dict(state)
    in_place = cache is not None and use_inplace_weights(x_BTD[..., 0].size, stacked["attn"]["q"])
    of_experts = _expert_adapters(specs, adapters, x_BTD.dtype) if in_place else {}

    def layer(carry, slice_of_run):
        (x_BTD, cache), (sliced, layer_adapters, bias_E) = carry, slice_of_run
        if in_place:
            weights = _layer_in_place(specs, stacked, sliced)
            layer_adapters = _adapters_in_place(of_experts, layer_adapters, sliced)
        else:
            weights, layer_adapters = _gathered_layer(specs, sliced, layer_adapters, x_BTD.dtype)
        of_layer = context._replace(router_bias_E=bias_E)
        x_BTD, cache, routing, outputs = nnx.merge(graph, weights)(x_BTD, of_layer, cache, layer_adapters)
        if cache is not None:
            cache = cache._replace(layer=cache.layer + 1)
        return (x_BTD, cache), (routing, {name: outputs[name] for name in keep})

    if remat:
        layer = jax.checkpoint(layer, prevent_cse=False)
    slices = jnp.arange(len(stacked["attn_norm"])) if in_place else stacked
    (x_BTD, cache), kept = jax.lax.scan(layer, (x_BTD, cache), (slices, dict(adapters), router_bias_LE))
    return x_BTD, cache, kept


def _layer_in_place(specs: Tree, stacked: Tree, number: jax.Array) -> Tree:
    """One layer's weights: the matrices not yet read."""
    of_path = leaves(specs)
    return map_with_path(
        lambda path, stack: LayerSlice(stack, number) if of_path[path].contracted else stack[number], stacked
    )


def _expert_adapters(specs: Tree, adapters: Adapters, dtype: Any) -> dict[str, Adapter]:
    """Those of the experts of all layers, in a dtype that kernels read in place."""
    of_path = leaves(specs)
    read = jnp.float32 if target_platform() == "cpu" else dtype
    return {
        path: dataclasses.replace(adapter, a=adapter.a.astype(read), b=adapter.b.astype(read))
        for path, adapter in leaves(dict(adapters)).items()
        if "experts" in of_path[path].stacked
    }


def _adapters_in_place(of_experts: dict[str, Adapter], layer_adapters: Tree, number: jax.Array) -> Tree:
    """One layer's adapters: the experts' not yet read. The others are small: with several rows copies are faster."""

    def replace(path: str, adapter: Adapter) -> Adapter:
        if path not in of_experts:
            return adapter
        a, b = (LayerSlice(stack, number) for stack in (of_experts[path].a, of_experts[path].b))
        return dataclasses.replace(adapter, a=a, b=b)

    return map_with_path(replace, layer_adapters)


def _gathered_layer(specs: Tree, weights: Tree, adapters: Tree, dtype: Any) -> tuple[Tree, Tree]:
    """One layer's weights and adapters as they are used, but for the experts', which moe.py gathers.

    Adapters are cast first: half of the bytes of the float32 that is trained go over the wires.
    """
    mesh = jax.sharding.get_abstract_mesh()
    of_path = leaves(specs)

    def gather(spec: ParamSpec, array: Any) -> Any:
        if isinstance(array, FakeQuantized):
            return FakeQuantized(gather(spec, array.weight))
        if not spans_devices(mesh) or "experts" in spec.stacked or not spec.contracted:
            return array
        stored = partition_spec(spec, mesh.shape)
        places = PartitionSpec(*stored[1:]), PartitionSpec(*used_spec(spec, stored)[1:])
        if isinstance(array, Fp8Weight):
            return dataclasses.replace(array, values=gathered(array.values, *places))
        return gathered(array, *places)

    def gather_adapter(path: str, adapter: Adapter) -> Adapter:
        spec = of_path[path]
        spec_a, spec_b = factors(spec, adapter.a.shape[-1])
        cast = jnp.float32 if path == "ffn/router" else dtype
        a, b = gather(spec_a, adapter.a.astype(cast)), gather(spec_b, adapter.b.astype(cast))
        return dataclasses.replace(adapter, a=a, b=b)

    return (
        map_with_path(lambda path, array: gather(of_path[path], array), weights),
        map_with_path(gather_adapter, adapters),
    )


@functools.lru_cache(maxsize=32)
def graph_of(config: ModelConfig) -> Any:
    """The NNX graph definition of a model; merge it with a nested dict of arrays to get a callable."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config)))[0]


def hidden_states(
    config: ModelConfig,
    params: Tree,
    tokens_BT: jax.Array,
    *,
    adapters: Tree | None = None,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    cache: KVCache | None = None,
    num_new_tokens_B: jax.Array | None = None,
    remat: bool = False,
    router_bias_LE: jax.Array | None = None,
    whole_groups: bool = False,
    keep: Sequence[str] = (),
) -> HiddenOutput:
    """All blocks over int32 tokens (B, T), and the final norm; jit it (with `config` and `remat` closed over).

    Args:
        params: the schema's tree; computation is in the dtype of `params["embed"]`.
        adapters: LoRA adapters (lora.py).
        positions: (B, T) positions for RoPE; by default 0, 1, … after what the cache holds.
        segments: (B, T) document numbers of packed sequences, from 1; 0 is padding, which no statistic of the routing
            counts. Not together with a cache.
        cache: keys and values so far; the new ones are written behind them. The caller sees that they fit.
        num_new_tokens_B: with a cache: how many of the tokens count in each row, the first ones; by default all.
        remat: recompute each block in the backward pass instead of keeping its activations.
        router_bias_LE: of the MoE layers, added to the routers' logits for the choice of experts alone.
        whole_groups: see moe.with_gradient_of_groups.
        keep: of "attention" and "ffn" those of which each layer's output is given, as it was added to the stream.
    """
    model = nnx.merge(graph_of(config), params)
    return model(
        tokens_BT,
        adapters=adapters or NO_ADAPTERS,
        positions=positions,
        segments=segments,
        cache=cache,
        num_new_tokens_B=num_new_tokens_B,
        remat=remat,
        router_bias_LE=router_bias_LE,
        whole_groups=whole_groups,
        keep=keep,
    )


def logits(
    config: ModelConfig, params: Tree, x_BTD: jax.Array, adapters: Tree | None = None, decoding: bool = False
) -> jax.Array:
    """Float32 logits (B, T, V) of hidden states; of the trees it reads "head" alone, or "embed" where that is tied."""
    adapters = adapters or {}
    if not config.tied:
        head: Any = params["head"]
        if decoding and use_inplace_weights(x_BTD[..., 0].size, head):
            head = LayerSlice(head[None], 0)
        return project(x_BTD, head, 1, adapters.get("head")).astype(jnp.float32)
    logits_BTV = project(x_BTD, params["embed"].T, 1, None)
    adapter = adapters.get("embed")
    if adapter is not None:
        a_RV, b_DR = adapter.a.T.astype(x_BTD.dtype), adapter.b.T.astype(x_BTD.dtype)
        logits_BTV += adapter.scale * mask_ranks(x_BTD @ b_DR, adapter) @ a_RV
    return logits_BTV.astype(jnp.float32)


def forward(
    config: ModelConfig, params: Tree, tokens_BT: jax.Array, *, adapters: Tree | None = None, **options: Any
) -> Output:
    """Logits of whole sequences, float32; an ordinary JAX function.

    Args:
        tokens_BT: token ids.
        adapters: LoRA adapters by the schema's paths.
        options: what `hidden_states` takes: positions, segments, cache, remat.

    Returns:
        The logits (B, T, V), the cache where one was given, and the routing of an MoE.
    """
    x_BTD, cache, routing, _ = hidden_states(config, params, tokens_BT, adapters=adapters, **options)
    return Output(logits(config, params, x_BTD, adapters, decoding=cache is not None), cache, routing)
