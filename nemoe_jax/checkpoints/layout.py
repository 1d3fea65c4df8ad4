"""The two layouts of a model directory: Hugging Face's and Mistral's own."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nemoe_jax.checkpoints import mistral_format
from nemoe_jax.spec import hf_config
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import ParamSpec

CONFIG = "config.json"
PARAMS = "params.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONSOLIDATED = "consolidated.safetensors"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model directory spells a model; keys are Hugging Face's, names are those on disk."""

    config_file: str
    single: str  # the weight file, where there is one
    parse: Callable[[Any, str], ModelConfig]  # (content of the config file, what errors call it)
    content: Callable[[ModelConfig], dict[str, Any]]  # the inverse of `parse`
    name: Callable[[str], str]  # key -> name
    key: Callable[[str], str | None]  # name -> key; None where a name does not belong here
    to_disk: Callable[[str, np.ndarray, int], np.ndarray]  # (key, tensor, head_dim)
    from_disk: Callable[[str, np.ndarray, int], np.ndarray]
    stored: Callable[[ParamSpec, str, str], dict[str, tuple[tuple[int, ...], str]]]  # see `_one_tensor`
    encode: Callable[[ParamSpec, str, np.ndarray], dict[str, np.ndarray]]  # (spec, name, tensor) -> what is written

    @property
    def index(self) -> str:
        """The file that lists the shards, where there are several."""
        return f"{self.single}.index.json"

    def shard(self, number: int, shards: int) -> str:
        """The name of one of several weight files, counted from 1."""
        return self.single.replace(".", f"-{number:05d}-of-{shards:05d}.")

    def has_weights(self, directory: str | Path) -> bool:
        """Whether there is a weight file of this layout, or an index."""
        return any((Path(directory) / name).is_file() for name in (self.single, self.index))


def _one_tensor(spec: ParamSpec, name: str, dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name on disk: (shape, dtype)} of what a tensor is written as."""
    return {name: (spec.torch_shape, dtype)}


def _unchanged(spec: ParamSpec, name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    return {name: tensor}


def _as_it_is(key: str, tensor: np.ndarray, head_dim: int) -> np.ndarray:
    return tensor


HUGGING_FACE = Layout(
    CONFIG, SINGLE, hf_config.from_hf, hf_config.to_hf, str, str, _as_it_is, _as_it_is, _one_tensor, _unchanged
)
MISTRAL = Layout(
    PARAMS,
    CONSOLIDATED,
    mistral_format.from_params,
    mistral_format.to_params,
    mistral_format.to_mistral_key,
    mistral_format.from_mistral_key,
    mistral_format.to_mistral_rows,
    mistral_format.from_mistral_rows,
    _one_tensor,
    _unchanged,
)


def layout_of(directory: str | Path) -> Layout:
    """The layout of a model directory: Hugging Face's where both have all they need."""
    layouts = [layout for layout in (HUGGING_FACE, MISTRAL) if (Path(directory) / layout.config_file).is_file()]
    return next((layout for layout in layouts if layout.has_weights(directory)), [*layouts, HUGGING_FACE][0])
