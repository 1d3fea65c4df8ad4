"""The two layouts of a model directory: Hugging Face's and Mistral's own."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nemoe_jax.checkpoints import mistral_format
from nemoe_jax.spec.config import ModelConfig

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


def _as_it_is(key: str, tensor: np.ndarray, head_dim: int) -> np.ndarray:
    return tensor


HUGGING_FACE = Layout(CONFIG, SINGLE, ModelConfig.from_hf, ModelConfig.to_hf, str, str, _as_it_is, _as_it_is)
MISTRAL = Layout(
    PARAMS,
    CONSOLIDATED,
    mistral_format.from_params,
    mistral_format.to_params,
    mistral_format.to_mistral_key,
    mistral_format.from_mistral_key,
    mistral_format.to_mistral_rows,
    mistral_format.from_mistral_rows,
)


def layout_of(directory: str | Path) -> Layout:
    """The layout of a model directory: Hugging Face's where both have all they need."""
    layouts = [layout for layout in (HUGGING_FACE, MISTRAL) if (Path(directory) / layout.config_file).is_file()]
    return next((layout for layout in layouts if layout.has_weights(directory)), [*layouts, HUGGING_FACE][0])
