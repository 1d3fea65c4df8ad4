"""Reading model directories: config.json, and the tensors of the safetensors shards, checked against the schema."""

import functools
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nemoe_jax.config import ModelConfig
from nemoe_jax.errors import UserError
from nemoe_jax.schema import ParamSpec, declare, leaves
from nemoe_jax.tensor_file import TensorFile

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PROBLEMS_SHOWN = 20


class TensorRef(NamedTuple):
    """One checkpoint tensor: a spec and the index into its stacked axes."""

    spec: ParamSpec
    place: tuple[int, ...]
    key: str


def read_config(directory: str | Path) -> ModelConfig:
    """The config.json of a model directory.

    Raises:
        UserError: not a model directory, or a model that this package does not know.
    """
    path = Path(directory) / CONFIG
    if not Path(directory).is_dir():
        raise UserError(f"{directory}: no such directory")
    if not path.is_file():
        raise UserError(f"{directory}: not a model directory: no config.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    return ModelConfig.from_hf(content, str(path))


class Checkpoint:
    """The tensors of a model directory, checked against the schema of its config."""

    def __init__(self, directory: str | Path):
        """Reads config.json and every header.

        Raises:
            UserError: anything missing, unexpected, misshapen or damaged; tensors are listed together.
        """
        self.directory, self.config_file = Path(directory), CONFIG
        self.config = read_config(directory)
        files = [TensorFile(path) for path in self._paths()]
        self.files = {name: file for file in files for name in file.entries}
        self._check()

    def _paths(self) -> list[Path]:
        index = self.directory / INDEX
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{index}: not an index of safetensors shards ({error!r})") from error
            missing = [name for name in names if not (self.directory / name).is_file()]
            if missing:
                raise UserError(f"{self.directory}: missing shard {', '.join(missing)} (listed in {INDEX})")
            return [self.directory / name for name in names]
        if (self.directory / SINGLE).is_file():
            return [self.directory / SINGLE]
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.directory.glob(pattern))
        if pickles:
            raise UserError(
                f"{self.directory}: only pickle files ({pickles[0]}), which can run code when they are opened; "
                "save the model as safetensors first"
            )
        raise UserError(f"{self.directory}: no weights: neither {SINGLE} nor {INDEX}")

    def _check(self) -> None:
        wanted = {ref.key: ref.spec for ref in itertools.chain.from_iterable(units(self.config))}
        problems = [f"missing {key} {spec.torch_shape}" for key, spec in wanted.items() if key not in self.files]
        for key, file in self.files.items():
            shape = file.entries[key].shape
            if key not in wanted:
                # what transformers, too, ignores: a copy of tied embeddings, old RoPE buffers
                if not (key.endswith("rotary_emb.inv_freq") or (self.config.tied and key == "lm_head.weight")):
                    problems.append(f"unexpected {key} {shape} in {file.path.name}")
            elif shape != wanted[key].torch_shape:
                spec = wanted[key]
                problems.append(
                    f"{spec.path}: wanted {key} of shape {spec.torch_shape}, got {shape} from {file.path.name}"
                )
        if problems:
            more = f"; and {len(problems) - _PROBLEMS_SHOWN} more" if len(problems) > _PROBLEMS_SHOWN else ""
            raise UserError(f"{self.directory}: " + "; ".join(problems[:_PROBLEMS_SHOWN]) + more)

    def view(self, key: str) -> np.ndarray:
        """A tensor as it stands on disk, mapped."""
        return self.files[key].view(key)

    def read(self, spec: ParamSpec, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """Part of a leaf in the schema's layout, copied from disk: `leaf[index]`."""
        spans = [range(*part.indices(size)) for part, size in zip(index, spec.shape, strict=True)]
        block = np.empty([len(span) for span in spans], dtype)
        stacked = len(spec.stacked)
        inner = spec.shape[stacked:]
        inputs = len(spec.contracted)
        for place, key in _positions(spec, spans[:stacked]):
            tensor = self.view(key)
            if spec.transposed:  # (produced…, contracted…) on disk
                tensor = tensor.reshape(*inner[inputs:], *inner[:inputs])
                tensor = tensor.transpose(*range(len(inner) - inputs, len(inner)), *range(len(inner) - inputs))
            block[place] = tensor[index[stacked:]]
        return block


def _positions(spec: ParamSpec, spans: list[range]) -> Iterable[tuple[tuple[int, ...], str]]:
    """(place in a block, checkpoint key) of the tensors whose stacked indices lie within `spans`."""
    for numbers, key in spec.tensors():
        if all(number in span for number, span in zip(numbers, spans, strict=True)):
            yield tuple(number - span.start for number, span in zip(numbers, spans, strict=True)), key


@functools.lru_cache(maxsize=32)
def units(config: ModelConfig) -> list[list[TensorRef]]:
    """A checkpoint's tensors in order, as the units that are written together: embedding, each layer, norm and head."""
    by_unit: list[list[TensorRef]] = [[] for _ in range(config.layers + 2)]
    for spec in leaves(declare(config)).values():
        for index, key in spec.tensors():
            if "layers" in spec.stacked:
                unit = 1 + spec.first_layer + index[0]
            else:
                unit = 0 if spec.lookup else config.layers + 1
            by_unit[unit].append(TensorRef(spec, index, key))
    return by_unit
