"""The parameter schema: every array a model owns, declared once.

A weight reads as what it does. `"experts | embed -> expert_ffn"` is stacked over experts, contracts the activation's
embed axis and produces the expert's neurons; the array's shape is (layers, experts, embed, expert_ffn). PyTorch stores
a linear map the other way round, (produced, contracted); a look-up table (`vocab -> embed`) and an array without an
arrow (`"norm"`) it stores as they stand here.

    declare(config)["blocks"]["moe"]["ffn"]["gate"]
    -> ParamSpec(stacked=("layers", "experts"), contracted=("embed",), produced=("expert_ffn",), …)

Shapes, initial values, counts, checkpoint keys, shardings (sharding.py) and adapters (lora.py) derive from this tree.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemoe_jax.spec.config import LayerGroup, ModelConfig
from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.spec.first_values import first_values

Tree = dict[str, Any]  # a nested dict; leaves are ParamSpecs, arrays, or whatever was derived from them


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One array of the model: its axes by role, its sizes, its first values and its name in a checkpoint."""

    path: str
    stacked: tuple[str, ...]
    contracted: tuple[str, ...]
    produced: tuple[str, ...]
    shape: tuple[int, ...]
    key: str  # checkpoint key, a template over {layer} and {expert}
    first_layer: int  # absolute number of the layer at index 0 of the "layers" axis
    std: float | None  # standard deviation of the initial values; None for ones
    lookup: bool = False  # rows are looked up, not multiplied

    @property
    def axes(self) -> tuple[str, ...]:
        """Logical axis names, one for each dimension of the array."""
        return self.stacked + self.contracted + self.produced

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(in, out) of one unstacked linear map, its several axes flattened."""
        inner = self.shape[len(self.stacked) :]
        return math.prod(inner[: len(self.contracted)]), math.prod(inner[len(self.contracted) :])

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of one checkpoint tensor: (out, in) for a linear map, flat for biases and norms, a table as it is."""
        if self.transposed:
            return self.matrix_shape[::-1]
        return self.matrix_shape if self.lookup else self.matrix_shape[1:]

    @property
    def torch_size(self) -> int:
        """Elements of one checkpoint tensor."""
        return math.prod(self.torch_shape)

    @property
    def transposed(self) -> bool:
        """Whether the checkpoint holds (out, in)."""
        return bool(self.contracted) and not self.lookup

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """(index into the stacked axes, checkpoint key) of each tensor that the array is made of."""
        for index in itertools.product(*(range(n) for n in self.shape[: len(self.stacked)])):
            number = dict(zip(self.stacked, index, strict=True))
            yield index, self.key_of(number.get("layers", 0) + self.first_layer, number.get("experts", 0))

    def key_of(self, layer: int, expert: int = 0) -> str:
        """The checkpoint key of one tensor, by the absolute number of its layer."""
        return self.key.format(layer=layer, expert=expert)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """One unstacked array of this spec in the checkpoint's layout (a view where NumPy can)."""
        return array.reshape(self.matrix_shape).T if self.transposed else array.reshape(self.torch_shape)


def declare(config: ModelConfig) -> Tree:
    """The tree of ParamSpecs of a model: embed, blocks/<kind>/…, norm and, unless tied, head."""
    sizes = {
        "vocab": config.vocab,
        "embed": config.hidden,
        "norm": config.hidden,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "ffn": config.ffn,
        "experts": config.experts,
        "expert_ffn": config.expert_ffn,
        "shared_ffn": config.shared_ffn,
        "scalar": 1,
    }
    residual_scale = (2 * config.layers) ** -0.5  # each block adds to the stream twice
    family = FAMILIES[config.family]

    def p(
        roles: str,
        key: str,
        *,
        run: LayerGroup | None = None,
        scale: float = 1.0,
        lookup: bool = False,
        suffix: str = ".weight",
    ) -> ParamSpec:
        stacked, _, linear = roles.rpartition("|")
        contracted, arrow, produced = linear.rpartition("->")
        axes = [tuple(part.split()) for part in (stacked, contracted, produced)]
        shape = [sizes[axis] for part in axes for axis in part]
        if run:
            axes[0] = ("layers", *axes[0])
            shape = [run.layers, *shape]
            key = "model.layers.{layer}." + key
        fan_in = 1 if lookup else math.prod(sizes[axis] for axis in axes[1])
        return ParamSpec(
            path="",
            stacked=axes[0],
            contracted=axes[1],
            produced=axes[2],
            shape=tuple(shape),
            key=key + suffix,
            first_layer=run.first if run else 0,
            std=0.0 if suffix == ".bias" else scale * fan_in**-0.5 if arrow else None,
            lookup=lookup,
        )

    def attention(run: LayerGroup) -> Tree:
        tree = {
            "q": p("embed -> heads head_dim", "self_attn.q_proj", run=run),
            "k": p("embed -> kv_heads head_dim", "self_attn.k_proj", run=run),
            "v": p("embed -> kv_heads head_dim", "self_attn.v_proj", run=run),
            "o": p("heads head_dim -> embed", "self_attn.o_proj", run=run, scale=residual_scale),
        }
        for name in config.attention_bias.removeprefix("none"):
            produced = "embed" if name == "o" else " ".join(tree[name].produced)
            tree[f"{name}_bias"] = p(produced, f"self_attn.{name}_proj", run=run, suffix=".bias")
        if config.qk_norm:
            whole = family.qk_norm_over == "projection"
            tree |= {
                "q_norm": p("heads head_dim" if whole else "head_dim", "self_attn.q_norm", run=run),
                "k_norm": p("kv_heads head_dim" if whole else "head_dim", "self_attn.k_norm", run=run),
            }
        return tree

    def swiglu(run: LayerGroup, stacked: str, width: str, keys: tuple[str, str, str]) -> Tree:
        gate, up, down = keys
        return {
            "gate": p(f"{stacked}embed -> {width}", gate, run=run),
            "up": p(f"{stacked}embed -> {width}", up, run=run),
            "down": p(f"{stacked}{width} -> embed", down, run=run, scale=residual_scale),
        }

    def ffn(run: LayerGroup) -> Tree:
        if run.kind == "dense":
            return swiglu(run, "", "ffn", _DENSE_FFN)
        tree = {
            "router": p("embed -> experts", family.router, run=run),
            **swiglu(run, "experts | ", "expert_ffn", family.experts),
        }
        if config.shared_ffn:
            tree["shared"] = swiglu(run, "", "shared_ffn", _SHARED)
            tree["shared_gate"] = p("embed -> scalar", "mlp.shared_expert_gate", run=run)
        return tree

    def block(run: LayerGroup) -> Tree:
        return {
            "attn_norm": p("norm", "input_layernorm", run=run),
            "attn": attention(run),
            "ffn_norm": p("norm", "post_attention_layernorm", run=run),
            "ffn": ffn(run),
        }

    tree = {
        "embed": p("vocab -> embed", "model.embed_tokens", scale=0.1, lookup=True),
        "blocks": {run.kind: block(run) for run in config.runs},
        "norm": p("norm", "model.norm"),
    }
    if not config.tied:
        tree["head"] = p("embed -> vocab", "lm_head")
    return map_with_path(lambda path, spec: dataclasses.replace(spec, path=path), tree)


_DENSE_FFN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")


def map_with_path(function: Callable[[str, Any], Any], tree: Tree, prefix: str = "") -> Tree:
    """`function("blocks/moe/ffn/up", leaf)` over a nested dict, keeping its structure and order."""
    return {
        name: map_with_path(function, value, f"{prefix}{name}/")
        if isinstance(value, dict)
        else function(prefix + name, value)
        for name, value in tree.items()
    }


def leaves(tree: Tree) -> dict[str, Any]:
    """{path: leaf} of a nested dict, in the order of its declaration."""
    flat: dict[str, Any] = {}
    map_with_path(flat.__setitem__, tree)
    return flat


def unflatten(flat: dict[str, Any]) -> Tree:
    """The nested dict of a {path: leaf} mapping; the inverse of `leaves`."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def initialize(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32, shardings: Tree | None = None) -> Tree:
    """Random first values, each array made where it will live.

    Linear maps are normal with standard deviation in^-1/2 (those that write to the residual stream times
    (2 layers)^-1/2), norms are ones. An array's values depend on the key and its path alone, not on the mesh.
    """
    specs = leaves(declare(config))
    placed = leaves(shardings) if shardings else dict.fromkeys(specs)
    keys = jax.random.split(key, len(specs))
    return unflatten(
        {
            path: first_values(keys[number], spec.shape, spec.std, dtype, placed[path])
            for number, (path, spec) in enumerate(specs.items())
        }
    )


def count(config: ModelConfig) -> tuple[int, int]:
    """(parameters in all, parameters that one token uses: `top_k` of the experts and everything else)."""
    total = active = 0
    for spec in leaves(declare(config)).values():
        size = math.prod(spec.shape)
        total += size
        active += size * config.top_k // config.experts if "experts" in spec.stacked else size
    return total, active
