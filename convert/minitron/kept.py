"""What stays of a pruned model, and its tensors cut out of the source's.

D embed, F neurons, E experts, N heads.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from nemoe_jax.checkpoints.reader import Checkpoint, TensorRef, units
from nemoe_jax.spec.config import ModelConfig

NEURON_AXES = ("ffn", "expert_ffn", "shared_ffn")  # as ModelConfig and the schema call them


@dataclasses.dataclass
class Kept:
    """Ascending indices of what stays, and the factors of the norms."""

    hidden_D: np.ndarray | None  # None: all
    neurons: list[
        dict[str, np.ndarray]
    ]  # of each layer, axes that are pruned: {axis: (F,), or (E, F), or (N,) of heads}
    factors: dict[str, float]  # {checkpoint key of a norm: what multiplies its weight}
    source: ModelConfig
    layers: list[int] | None = None  # of the source; None: all

    def source_ref(self, ref: TensorRef) -> TensorRef:
        """The source's tensor that one of the result's is cut from."""
        if self.layers is None or "layers" not in ref.spec.stacked:
            return ref
        layer = self.layers[ref.spec.first_layer + ref.place[0]]
        first = next(run.first for run in self.source.runs if run.first <= layer < run.first + run.layers)
        spec = dataclasses.replace(ref.spec, first_layer=first)
        return TensorRef(spec, (layer - first, *ref.place[1:]), spec.key_of(layer, *ref.place[1:]))

    def cut(self, ref: TensorRef, tensor: np.ndarray) -> np.ndarray:
        """A tensor of the source, in its checkpoint's layout, without what is dropped."""
        spec = ref.spec
        dimensions = [spec.produced, spec.contracted] if spec.transposed else [spec.contracted, spec.produced]
        for number, axes in enumerate(filter(None, dimensions)):
            kept = self._along(axes, ref)
            if kept is not None:
                tensor = np.take(tensor, kept, axis=number)
        return tensor.astype(np.float32) * self.factors[ref.key] if ref.key in self.factors else tensor

    def _along(self, axes: tuple[str, ...], ref: TensorRef) -> np.ndarray | None:
        if axes in (("embed",), ("norm",)):
            return self.hidden_D
        if axes[0] not in (*NEURON_AXES, "heads", "kv_heads"):
            return None
        own = self.neurons[ref.spec.first_layer + ref.place[0]]
        if len(axes) > 1:  # a head's elements are side by side; where each has keys of its own, they go with it
            heads_N = own.get("heads") if axes[0] == "heads" or self.source.heads == self.source.kv_heads else None
            size = self.source.head_dim
            return None if heads_N is None else (heads_N[:, None] * size + np.arange(size)).ravel()
        kept = own.get(axes[0])
        return kept[ref.place[1]] if kept is not None and "experts" in ref.spec.stacked else kept

    def digest(self) -> str:
        """Hexadecimal; an interrupted job goes on only where the text gives the same again."""
        indices = [self.hidden_D, *(kept for layer in self.neurons for kept in layer.values())]
        content = [None if kept is None else kept.tolist() for kept in indices], self.factors, self.layers
        return hashlib.sha256(repr(content).encode()).hexdigest()


class PrunedCheckpoint:
    """A pruned model as it would be on disk: what `LayerwiseModel` reads of a checkpoint."""

    def __init__(self, source: Checkpoint, config: ModelConfig, kept: Kept):
        self.source, self.config, self.kept = source, config, kept
        self.directory: Path = source.directory
        self._refs = {ref.key: kept.source_ref(ref) for unit in units(config) for ref in unit}

    def view(self, key: str, dtype: Any = None) -> np.ndarray:
        """A tensor by the result's key."""
        ref = self._refs[key]
        return self.kept.cut(ref, self.source.view(ref.key, dtype))
