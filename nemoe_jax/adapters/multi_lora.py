"""Several adapters over one model in one batch, each row its own: what serves many tenants at once.

The adapters of a weight stand side by side along the rank. One product with all their A and one with all their B serve
the batch, and between them what other rows' adapters made of a row is zeroed:

    y = x @ W + own(x @ [A1 A2 …]) @ [s1 B1; s2 B2; …]

    joined = bank(config, {"sql": adapters, "poems": others})
    forward(config, params, tokens_BT, adapters=select_adapters(joined, index_B))       e.g. [1, 0, -1]; -1: no adapter

So which rows use which adapter is data, for which nothing is compiled anew, and no weights are gathered. Punica (Chen
et al. 2023, arXiv 2310.18547) and S-LoRA (Sheng et al. 2023, arXiv 2311.03285) gather them for each row instead: that
reads less where there are many adapters of which few are in use, and wants kernels of its own.

B batch, T sequence, L layers, K joined ranks.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from nemoe_jax.adapters.lora import Adapter, factors
from nemoe_jax.errors import UserError, listed
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import ParamSpec, Tree, leaves, map_with_path, unflatten
from nemoe_jax.spec.sharding import partition_spec

RANKS = 16  # K is a multiple: kernels of GPUs would copy all layers' factors to make it one


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["a", "b", "key", "index"], meta_fields=["scale", "dropout", "ranks"]
)
@dataclasses.dataclass(frozen=True)
class StackedAdapter(Adapter):
    """Adapters of one weight, of which each row uses its own."""

    ranks: tuple[int, ...] = ()  # of each adapter; 0 where it leaves the weight alone
    index: Any = None  # int32: the number of each row's adapter, (L, B) where the weight is stacked over layers


def stack_adapters(
    config: ModelConfig, adapters: Mapping[str, Tree], dtype: jax.typing.DTypeLike = jnp.float32
) -> Tree:
    """The adapters as one tree, on their devices, from which `select_adapters` chooses for each row of a batch.

    Their targets and ranks may differ.

    Args:
        adapters: by name, for errors; rows choose by a name's number, from 0 in the order given.
        dtype: of the result but for the router and the embedding, which stay float32. The model's own halves what every
            step reads; on CPU float32 is faster.

    Raises:
        UserError: an adapter that is more than low-rank updates of the model's linear maps; all such are named.
    """
    specs = leaves(schema.declare(config))
    by_name = {name: leaves(tree) for name, tree in adapters.items()}
    problems = [
        f"adapter {name}: {path}: {problem}"
        for name, flat in by_name.items()
        for path, adapter in flat.items()
        if (problem := _misfit(specs.get(path), adapter))
    ]
    if problems:
        raise UserError(listed(problems))
    joined = {}
    for path, spec in specs.items():
        own = [flat.get(path) for flat in by_name.values()]
        if any(own):
            exact = spec.lookup or path.endswith("/router")
            joined[path] = _join(len(spec.stacked), own, jnp.float32 if exact else dtype)
    return unflatten(joined)


def empty_stack(
    config: ModelConfig, paths: Sequence[str], count: int, rank: int, dtype: jax.typing.DTypeLike, mesh: Mesh | None
) -> Tree:
    """A stack with room for so many adapters of these weights, of that rank at most: all zero, for `put_adapter`."""
    specs = leaves(schema.declare(config))
    stack = {}
    for path in paths:
        spec = specs[path]
        ranks = [min(rank, *spec.matrix_shape)] * count
        total = sum(ranks) + -sum(ranks) % RANKS
        exact = spec.lookup or path.endswith("/router")

        def zeros(part: ParamSpec, exact: bool = exact) -> jax.Array:
            place: Any = SingleDeviceSharding(jax.local_devices()[0])
            if mesh is not None:
                place = NamedSharding(mesh, partition_spec(part, mesh.shape))
            return jax.device_put(jnp.zeros(part.shape, jnp.float32 if exact else dtype), place)

        a, b = map(zeros, factors(spec, total))
        ranks[-1] += total - sum(ranks)
        stack[path] = StackedAdapter(a, b, 1.0, ranks=tuple(ranks))
    return unflatten(stack)


def put_adapter(config: ModelConfig, stacked: Tree, number: int, adapters: Tree) -> Tree:
    """A stack with an adapter in that place; the one before is gone, shapes and devices stay the same.

    Raises:
        UserError: no low-rank updates of the stack's weights, or of a larger rank; all are named.
    """
    specs, flat, stack = leaves(schema.declare(config)), leaves(adapters), leaves(stacked)
    problems = []
    for path, adapter in flat.items():
        problem = _misfit(specs.get(path), adapter)
        if problem is None and path not in stack:
            problem = f"there is no room for an adapter of it; there is for {', '.join(stack)}"
        elif problem is None and adapter.a.shape[-1] > stack[path].ranks[0]:
            problem = f"expected a rank of at most {stack[path].ranks[0]}, got {adapter.a.shape[-1]}"
        if problem is not None:
            problems.append(f"{path}: {problem}")
    if problems:
        raise UserError(listed(problems))

    def put(path: str, old: StackedAdapter) -> StackedAdapter:
        rank = old.ranks[number]
        first = sum(old.ranks[:number])
        adapter, axis = flat.get(path), len(specs[path].stacked)

        def place(array: jax.Array, new: jax.Array | None, scale: float, axis: int) -> jax.Array:
            shape = [rank if at == axis else size for at, size in enumerate(array.shape)]
            here = tuple(slice(first, first + rank) if at == axis else slice(None) for at in range(array.ndim))
            if new is None:
                return array.at[here].set(0)
            fill = [(0, size - own) for size, own in zip(shape, new.shape, strict=True)]
            return array.at[here].set(jnp.pad(np.float32(scale) * new, fill).astype(array.dtype))

        def both(old_a: Any, old_b: Any, new_a: Any, new_b: Any) -> Any:
            scale = 1.0 if adapter is None else adapter.scale
            return place(old_a, new_a, 1.0, old_a.ndim - 1), place(old_b, new_b, scale, axis)

        new = (None, None) if adapter is None else (adapter.a, adapter.b)
        a, b = jax.jit(both, out_shardings=(old.a.sharding, old.b.sharding))(old.a, old.b, *new)
        return dataclasses.replace(old, a=a, b=b)

    return map_with_path(put, stacked)


def _misfit(spec: ParamSpec | None, adapter: Any) -> str | None:
    """Why it cannot be joined with others."""
    if spec is None or not spec.contracted:
        return "the model has no such linear map"
    if not isinstance(adapter, Adapter) or isinstance(adapter, StackedAdapter):
        return f"expected a low-rank update, got {type(adapter).__name__}; merge it into a model of its own"
    wanted = tuple(factor.shape for factor in factors(spec, adapter.a.shape[-1]))
    got = adapter.a.shape, adapter.b.shape
    return (
        None if got == wanted else f"expected A and B of shapes {wanted[0]} and {wanted[1]}, got {got[0]} and {got[1]}"
    )


def _join(stacked: int, own: Sequence[Adapter | None], dtype: jax.typing.DTypeLike) -> StackedAdapter:
    ranks = [adapter.a.shape[-1] if adapter else 0 for adapter in own]
    ranks[-1] += -sum(ranks) % RANKS  # of zeros
    present = [adapter for adapter in own if adapter]

    def join(matrices: list[jax.Array], axis: int) -> jax.Array:
        array = jnp.concatenate(matrices, axis)
        fill = [(0, sum(ranks) - size if number == axis else 0) for number, size in enumerate(array.shape)]
        return jnp.pad(array, fill).astype(dtype)

    def joined(matrices: list[jax.Array], axis: int) -> jax.Array:
        sharding = getattr(matrices[0], "sharding", None)
        place = sharding if isinstance(sharding, NamedSharding) else None
        return jax.jit(join, static_argnums=1, out_shardings=place)(matrices, axis)

    a = joined([adapter.a for adapter in present], present[0].a.ndim - 1)
    b = joined([np.float32(adapter.scale) * adapter.b for adapter in present], stacked)
    return StackedAdapter(a, b, 1.0, ranks=tuple(ranks))


def select_adapters(joined: Tree, index_B: jax.Array) -> Tree:
    """A `bank`'s adapters for a batch whose rows use those of these numbers, int32 (B,); -1 is the model alone."""

    def choose(path: str, adapter: StackedAdapter) -> StackedAdapter:
        stacked = path.startswith("blocks/")
        index = jnp.broadcast_to(index_B, (len(adapter.a), *index_B.shape)) if stacked else index_B
        return dataclasses.replace(adapter, index=index)

    return map_with_path(choose, joined)


def mask_ranks(low_rank: jax.Array, adapter: Adapter) -> jax.Array:
    """x @ A with zeros in the ranks of other adapters than the row's: (B, …, K), or with one index to each token."""
    if not isinstance(adapter, StackedAdapter):
        return low_rank
    assert adapter.index is not None, "a bank wants select_adapters"
    owner_K = np.repeat(np.arange(len(adapter.ranks)), adapter.ranks)
    index = adapter.index.reshape(*adapter.index.shape, *[1] * (low_rank.ndim - adapter.index.ndim))
    return jnp.where(index == owner_K, low_rank, 0)


def index_of_tokens(adapters: Mapping[str, Adapter], length: int) -> jax.Array | None:
    """The number of each token's adapter, (B, T); None where none of these is joined."""
    for adapter in adapters.values():
        if isinstance(adapter, StackedAdapter):
            return jnp.broadcast_to(adapter.index[:, None], (len(adapter.index), length))
    return None


def with_index(adapters: Mapping[str, Adapter], index: jax.Array | None) -> dict[str, Adapter]:
    """The adapters, those that are joined with another index."""
    return {
        name: dataclasses.replace(adapter, index=index) if isinstance(adapter, StackedAdapter) else adapter
        for name, adapter in adapters.items()
    }
