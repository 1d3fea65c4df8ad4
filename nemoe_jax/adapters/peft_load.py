"""Hugging Face PEFT's adapter directories as adapter trees to go on training; peft_save.py is the other direction.

    targets, adapters = load_adapters("adapter", config, mesh)

PEFT gives every module an adapter of its own; ours are stacked over layers and experts. Where some of them have none or
a smaller rank, the missing ranks are zero in A and B, whose gradients are then zero as well: they stay as they are.

Since transformers 5 an expert's gate and up are one tensor and share A. Both of ours get it, and are independent
afterwards; where B shows that some ranks serve gate alone and the others up (as our writer does it), each gets its own.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from nemoe_jax.adapters import lora
from nemoe_jax.adapters.lora import Adapter, Target
from nemoe_jax.adapters.peft_format import LowRank, PeftAdapter
from nemoe_jax.errors import UserError, listed
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import ParamSpec, Tree, leaves, map_with_path
from nemoe_jax.spec.sharding import RULES, Rules
from nemoe_jax.utils.progress import progress_bar


class _Stack(NamedTuple):
    """What a directory holds for one leaf of the schema."""

    spec: ParamSpec
    target: Target
    updates: dict[tuple[int, ...], LowRank]  # by the place in the leaf's stacked axes
    ranks: np.ndarray | None  # which of the ranks count; None for all


def read_targets(directory: str | Path, config: ModelConfig) -> list[Target]:
    """The targets of a PEFT adapter: one for each path, with its rank, scale and dropout.

    Raises:
        UserError: see `load_adapters`.
    """
    return [stack.target for stack in _stacks(PeftAdapter(directory, config), config).values()]


def load_adapters(
    directory: str | Path,
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    rules: Rules = RULES,
    progress: bool = False,
) -> tuple[list[Target], Tree]:
    """The adapters of a PEFT directory, float32, each array on its devices (without a mesh: the first one).

    The weights of an embedding, which PEFT saves beside its update though they do not change, are left out.

    Args:
        progress: show a progress bar on a terminal.

    Returns:
        The targets, with which `lora.abstract` and `lora.shardings` give the tree's shapes and places, and the tree.

    Raises:
        UserError: an adapter that does not fit the model (see `PeftAdapter`), or that is more than low-rank updates.
    """
    source = PeftAdapter(directory, config)
    stacks = _stacks(source, config)
    source.check_values(progress)
    targets = [stack.target for stack in stacks.values()]
    specs, places = lora.declare(config, targets), leaves(lora.shardings(config, targets, mesh, rules))

    def load(path: str, spec: Adapter) -> Adapter:
        a = _array(spec.a, places[path].a, lambda place: _factor(source, stacks[path], place, "a"))
        b = _array(spec.b, places[path].b, lambda place: _factor(source, stacks[path], place, "b"))
        bar.advance(task)
        return dataclasses.replace(spec, a=a, b=b)

    with progress_bar(visible=progress) as bar:
        task = bar.add_task(f"loading {Path(directory).name}", total=len(stacks))
        return targets, map_with_path(load, specs)


def _stacks(source: PeftAdapter, config: ModelConfig) -> dict[str, _Stack]:
    replaced = [f"{name} replaces {key}" for key, name in source.whole.items() if key not in source.low_rank]
    replaced += [f"{name} replaces rows of {key}" for key, (name, _) in source.rows.items()]
    replaced += [f"{name} is added to {key}" for key, (name, _) in source.biases.items()]
    replaced += [f"{update.magnitude} scales {key}" for key, update in source.low_rank.items() if update.magnitude]
    if replaced:
        raise UserError(
            f"{source.file.path}: {listed(replaced)}: not a low-rank update; merge the adapter into its "
            "model first (nemoe-convert merge)"
        )
    specs = leaves(schema.declare(config))
    updates = {
        path: {place: source.low_rank[key] for place, key in spec.tensors() if key in source.low_rank}
        for path, spec in specs.items()
    }
    mask_ranks: dict[str, np.ndarray] = {}
    for path in updates:
        if "experts" in specs[path].stacked and path.endswith("/gate"):
            mask_ranks |= _split_ranks(source, path, updates)
    stacks = {}
    for path, found in updates.items():
        ranks = mask_ranks.get(path)
        rank = max((update.rank for update in found.values()), default=0) if ranks is None else len(ranks)
        if not rank:
            continue
        scale = next(iter(found.values())).scale
        target = Target(path, rank, scale * rank, dropout=0.0 if specs[path].lookup else source.dropout)
        stacks[path] = _Stack(specs[path], target, found, ranks)
    try:
        lora.match(config, [stack.target for stack in stacks.values()])
    except UserError as error:
        raise UserError(f"{source.file.path}: {error}; or merge the adapter (nemoe-convert merge)") from None
    return stacks


def _split_ranks(source: PeftAdapter, gate: str, updates: dict[str, dict[Any, LowRank]]) -> dict[str, np.ndarray]:
    """The ranks of a fused gate_up_proj that are its gate's and its up's, where B is zero for the other in all experts.

    Empty where it is not fused, where ranks serve both, or where B is all zero (a fresh adapter).
    """
    up = gate.removesuffix("gate") + "up"
    halves = {path: {update.b: update for update in updates[path].values()} for path in (gate, up)}
    ranks = {(update.rank, update.outputs == slice(None)) for update in halves[gate].values()}
    if len(ranks) != 1 or next(iter(ranks))[1]:
        return {}
    used = {}
    for path, by_name in halves.items():
        used[path] = np.zeros(next(iter(ranks))[0], bool)
        for name, update in by_name.items():
            b = source.file.view(name)[update.outputs]
            used[path] |= (b.reshape(len(b), update.rank, -1) != 0).any(axis=(0, 2))
    if not (used[gate] | used[up]).any() or (used[gate] & used[up]).any():
        return {}
    return {path: np.flatnonzero(mask) for path, mask in used.items()}


def _factor(source: PeftAdapter, stack: _Stack, place: tuple[int, ...], which: str) -> np.ndarray | None:
    """A (inputs, rank) or B (rank, outputs) of one layer and expert, in our layout; None where there is none.

    Scales that differ within a leaf go into B.
    """
    update = stack.updates.get(place)
    if update is None:
        return None
    # an embedding that was adapted as a plain parameter has its rows in B
    from_a = (which == "a") != (stack.spec.lookup and not update.embedding)
    matrix = update.read_a(source.file) if from_a else update.read_b(source.file).T  # (rank, …) both
    if stack.ranks is not None:
        matrix = matrix[stack.ranks]
    matrix = np.pad(matrix, ((0, stack.target.rank - len(matrix)), (0, 0)))
    return matrix.T if which == "a" else matrix * np.float32(update.scale / stack.target.scale)


def _array(
    spec: ParamSpec, place: jax.sharding.Sharding, matrix: Callable[[tuple[int, ...]], np.ndarray | None]
) -> jax.Array:
    """A stacked array on its devices; each of them reads what it holds."""
    stacked = len(spec.stacked)

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # the sharding says where the parts lie
        spans = [range(*part.indices(size)) for part, size in zip(index, spec.shape, strict=True)]
        values = np.zeros([len(span) for span in spans], np.float32)
        for numbers in itertools.product(*spans[:stacked]):
            found = matrix(numbers)
            if found is not None:
                here = tuple(number - span.start for number, span in zip(numbers, spans[:stacked], strict=True))
                values[here] = found.reshape(spec.shape[stacked:])[index[stacked:]]
        return values

    return jax.make_array_from_callback(spec.shape, place, block)
