"""Adapter trees as PEFT's tensors: their names, shapes and values, one layer at a time (the format: peft_format.py).

Since transformers 5 an expert's gate and up are one parameter with one A. Ours have one each, so A is stacked from both
and B is block-diagonal: the same update, at a rank that is the sum of theirs.

E experts, D inputs, F outputs of an expert's matrix, R rank.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from nemoe_jax.adapters.lora import Adapter
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.spec.schema import ParamSpec, leaves
from nemoe_jax.spec.sharding import on_host

Experts = Literal["fused", "linear"]
_Triple = dict[str, Adapter]  # those of gate, up and down that are adapted


class Name(NamedTuple):
    """What adapter_config.json says of one module."""

    name: str  # of the module, or of its parameter
    rank: int
    scale: float
    parameter: bool = False


class Part(NamedTuple):
    """Tensors that are written together."""

    names: list[Name]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[], Iterable[np.ndarray]]  # in the order of `shapes`; a collective where processes share the arrays


def adapter_parts(config: ModelConfig, adapters: dict[str, Adapter], experts: Experts) -> Iterator[Part]:
    """The tensors of adapters by path.

    Args:
        experts: "fused" as transformers 5 has them, or "linear", a module for each expert's matrix, as it was before.
    """
    specs = leaves(schema.declare(config))
    by_parent: dict[str, _Triple] = {}
    for path, adapter in adapters.items():
        parent, _, name = path.rpartition("/")
        if "experts" in specs[path].stacked:
            by_parent.setdefault(parent, {})[name] = adapter
        else:
            yield from _plain_parts(config, specs[path], adapter, experts)
    for parent, triple in by_parent.items():
        own = {name: specs[f"{parent}/{name}"] for name in ("gate", "up", "down")}
        yield from _fused_parts(config, own, triple) if experts == "fused" else _linear_parts(own, triple)


def _on_host(array: Any, place: tuple[int, ...]) -> np.ndarray:
    """Part of an array in float32, gathered from all processes where they hold it together."""
    return on_host(array[place]).astype(np.float32)


def _pair(module: str, rows_of_a: int, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of A and B."""
    return {f"{module}.lora_A.weight": (rows_of_a, inputs), f"{module}.lora_B.weight": (outputs, rows_of_a)}


def _plain_parts(config: ModelConfig, spec: ParamSpec, adapter: Adapter, experts: Experts) -> Iterator[Part]:
    """A module for each layer."""
    (inputs, outputs), rank = spec.matrix_shape, adapter.a.shape[-1]
    for place, key in spec.tensors():
        module = key.removesuffix(".weight") if experts == "linear" else FAMILIES[config.family].module_of(key)
        shapes = _pair(module, rank, inputs, outputs)
        if spec.lookup:
            shapes = {f"{module}.lora_embedding_A": (rank, inputs), f"{module}.lora_embedding_B": (outputs, rank)}
        # transformers' router is a module of its own kind: PEFT takes its weight as a parameter
        parameter = experts == "fused" and FAMILIES[config.family].router_is_parameter and spec.path.endswith("/router")
        names = [Name(f"{module}.weight" if parameter else module, rank, adapter.scale, parameter)]
        if spec.lookup and config.tied:  # PEFT writes the head's view of it as well
            names.append(Name("lm_head", rank, adapter.scale))
            shapes |= _pair("lm_head", rank, outputs, inputs)
        yield Part(names, shapes, functools.partial(_plain, adapter, place, inputs, len(shapes)))


def _plain(adapter: Adapter, place: tuple[int, ...], inputs: int, count: int) -> list[np.ndarray]:
    a = _on_host(adapter.a, place).reshape(inputs, -1)
    b = _on_host(adapter.b, place).reshape(a.shape[1], -1)
    return [a.T, b.T, b, a][:count]


def _fused_parts(config: ModelConfig, specs: dict[str, ParamSpec], triple: _Triple) -> Iterator[Part]:
    """A layer's experts as one module with the parameters gate_up_proj and down_proj."""
    layers, count = specs["gate"].shape[:2]
    hidden, width = specs["gate"].matrix_shape
    halves: _Triple = {name: triple[name] for name in ("gate", "up") if name in triple}
    rank = sum(half.a.shape[-1] for half in halves.values())
    for layer in range(layers):
        key = specs["gate"].key_of(specs["gate"].first_layer + layer)
        module = FAMILIES[config.family].module_of(key).partition(".experts.")[0] + ".experts"
        if halves:
            inner = f"{module}.base_layer" if "down" in triple else module  # PEFT wraps it once for each parameter
            names = [Name(f"{module}.gate_up_proj", rank, next(iter(halves.values())).scale, True)]
            shapes = _pair(inner, count * rank, hidden, 2 * width)
            yield Part(names, shapes, functools.partial(_fused_halves, halves, layer, width))
        if "down" in triple:
            own_rank = triple["down"].a.shape[-1]
            names = [Name(f"{module}.down_proj", own_rank, triple["down"].scale, True)]
            shapes = _pair(module, count * own_rank, width, hidden)
            yield Part(names, shapes, functools.partial(_fused_down, triple["down"], layer))


def _fused_halves(halves: _Triple, layer: int, width: int) -> list[np.ndarray]:
    scale = next(iter(halves.values())).scale
    a_EDR = np.concatenate([_on_host(half.a, (layer,)) for half in halves.values()], axis=-1)
    b_ERF = np.zeros((a_EDR.shape[0], a_EDR.shape[2], 2 * width), np.float32)
    first = 0
    for name, half in halves.items():
        own_b_ERF = _on_host(half.b, (layer,)) * np.float32(half.scale / scale)
        ranks = slice(first, first + own_b_ERF.shape[1])
        b_ERF[:, ranks, slice(0, width) if name == "gate" else slice(width, None)] = own_b_ERF
        first = ranks.stop
    return _fused(a_EDR, b_ERF)


def _fused_down(down: Adapter, layer: int) -> list[np.ndarray]:
    return _fused(_on_host(down.a, (layer,)), _on_host(down.b, (layer,)))


def _fused(a_EDR: np.ndarray, b_ERF: np.ndarray) -> list[np.ndarray]:
    """Expert-major A (E R, D) and rank-major B (F, R E)."""
    a_ERD, b_FRE = a_EDR.swapaxes(1, 2), b_ERF.T
    return [a_ERD.reshape(-1, a_ERD.shape[2]), b_FRE.reshape(len(b_FRE), -1)]


def _linear_parts(specs: dict[str, ParamSpec], triple: _Triple) -> Iterator[Part]:
    """A module for each matrix of each expert, under its name in a checkpoint.

    PEFT fuses those of gate and up when it loads them, and wants both, of one rank and scale.
    """
    layers, count = specs["gate"].shape[:2]
    halves = [triple[name] for name in ("gate", "up") if name in triple]
    for name, spec in specs.items():
        together = halves if name != "down" else [triple[name]] if name in triple else []
        if not together:
            continue
        rank, scale = max(adapter.a.shape[-1] for adapter in together), together[0].scale
        for layer in range(layers):
            modules = [spec.key_of(spec.first_layer + layer, expert).removesuffix(".weight") for expert in range(count)]
            shapes: dict[str, tuple[int, ...]] = {}
            for module in modules:
                shapes |= _pair(module, rank, *spec.matrix_shape)
            read = functools.partial(_linear, triple.get(name), layer, scale, list(shapes.values()))
            yield Part([Name(module, rank, scale) for module in modules], shapes, read)


def _linear(adapter: Adapter | None, layer: int, scale: float, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    if adapter is None:
        return [np.zeros(shape, np.float32) for shape in shapes]
    padding = ((0, 0), (0, shapes[0][0] - adapter.a.shape[-1]), (0, 0))
    a_ERD = np.pad(_on_host(adapter.a, (layer,)).swapaxes(1, 2), padding)
    b_ERF = np.pad(_on_host(adapter.b, (layer,)), padding) * np.float32(adapter.scale / scale)
    return [matrix for a, b in zip(a_ERD, b_ERF, strict=True) for matrix in (a, b.T)]
