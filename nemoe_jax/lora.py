"""Low-rank adapters (LoRA, Hu et al. 2021), derived from the schema.

A weight's adapter has A: stacked axes + inputs + rank, and B: stacked axes + rank + outputs, so that every layer and
every expert has its own, and adds `scale · (x @ A) @ B` to `x @ W` (layers.py does). Adapters are a tree of their own
with the schema's paths; gradients over that tree leave the base alone.

    initialise(config, [Target("blocks/*/attn/*", rank=16, alpha=32)], key)
    -> {"blocks": {"moe": {"attn": {"q": Adapter(a=(L, D, R), b=(L, R, N, H), scale=2.0), …}}}}
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemoe_jax.config import ModelConfig
from nemoe_jax.errors import UserError
from nemoe_jax.schema import ParamSpec, Tree, declare, leaves, unflatten


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A low-rank update of one weight; `scale` is alpha / rank."""

    a: Any
    b: Any
    scale: float


@dataclasses.dataclass(frozen=True)
class Target:
    """Which weights get adapters: a glob over the schema's paths, and their rank and alpha."""

    pattern: str
    rank: int
    alpha: float


def adapter_axes(spec: ParamSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Logical axes of A and of B."""
    return (*spec.stacked, *spec.contracted, "rank"), (*spec.stacked, "rank", *spec.produced)


def match(config: ModelConfig, targets: Sequence[Target]) -> dict[str, tuple[ParamSpec, Target]]:
    """{path: (spec, target)} of the weights to adapt; the first target that matches a path wins.

    Raises:
        UserError: a target matches no linear map, or has a rank or alpha that is not positive.
    """
    specs = {path: spec for path, spec in leaves(declare(config)).items() if spec.contracted}
    chosen: dict[str, tuple[ParamSpec, Target]] = {}
    for target in targets:
        if target.rank < 1 or target.alpha <= 0:
            raise UserError(f"LoRA target {target.pattern}: wanted a positive rank and alpha, got {target}")
        matching = fnmatch.filter(specs, target.pattern)
        if not matching:
            raise UserError(f"LoRA target {target.pattern} matches no weight; the weights are: {', '.join(specs)}")
        for path in matching:
            chosen.setdefault(path, (specs[path], target))
    return chosen


def initialise(config: ModelConfig, targets: Sequence[Target], key: jax.Array) -> Tree:
    """Fresh adapters, float32: A normal with standard deviation in^-1/2, B zero, so that nothing changes at first."""

    def make(spec: ParamSpec, target: Target, key: jax.Array) -> Adapter:
        stacked = spec.shape[: len(spec.stacked)]
        inner = spec.shape[len(spec.stacked) :]
        inputs, outputs = inner[: len(spec.contracted)], inner[len(spec.contracted) :]
        a = jax.random.normal(key, (*stacked, *inputs, target.rank), jnp.float32) * math.prod(inputs) ** -0.5
        b = jnp.zeros((*stacked, target.rank, *outputs), jnp.float32)
        return Adapter(a, b, target.alpha / target.rank)

    chosen = match(config, targets)
    keys = jax.random.split(key, len(chosen))
    return unflatten({path: make(*chosen[path], keys[i]) for i, path in enumerate(chosen)})


def merge(config: ModelConfig, params: Tree, adapters: Tree) -> Tree:
    """W + scale · A @ B for every adapted weight, in W's dtype; the sum is formed in float32."""
    specs = leaves(declare(config))
    flat = leaves(params)
    for path, adapter in leaves(adapters).items():
        flat[path] = _merged(len(specs[path].stacked), flat[path], adapter)
    return unflatten(flat)


@functools.partial(jax.jit, static_argnums=0)
def _merged(stacked: int, weight: jax.Array, adapter: Adapter) -> jax.Array:
    rank = adapter.b.shape[stacked]
    lead = weight.shape[:stacked]
    a = adapter.a.reshape(*lead, -1, rank)
    b = adapter.b.reshape(*lead, rank, -1)
    update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(weight.shape)
    return (weight.astype(jnp.float32) + np.float32(adapter.scale) * update).astype(weight.dtype)
