"""What a conversion returns: a manifest, which is also conversion.json beside the weights; or the plan of a dry run."""

import dataclasses
import importlib.metadata
from typing import Any

from nemoe_jax.spec.config import ModelConfig

Figures = dict[str, Any]


def versions() -> dict[str, str]:
    """Of what decides about the numbers."""
    return {name: importlib.metadata.version(name) for name in ("nemoe-jax", "jax", "numpy")}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a dry run says: what would be written, whether it fits, and how long it takes."""

    files: dict[str, int]  # name: bytes
    free_bytes: int
    seconds_per_layer: float  # of one that had to be compiled
    seconds: float  # without the writing

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a conversion was told, was given, and found."""

    options: Figures  # the command and all that decides about the result
    result: ModelConfig
    source: str = ""  # name of the source's directory
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)  # of the source's files; in the first process
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)  # hashes of what else decides about the result
    figures: Figures = dataclasses.field(default_factory=dict)  # of the whole
    layers: list[Figures] = dataclasses.field(default_factory=list)  # of each layer, with its number as "layer"
    plan: Plan | None = None  # of a dry run, which has neither figures nor layers

    def as_json(self) -> dict[str, Any]:
        """What conversion.json holds."""
        return {
            "options": self.options,
            "source": {"name": self.source, "sha256": self.sha256},
            "result": dataclasses.asdict(self.result),
            "versions": versions(),
            **({"inputs": self.inputs} if self.inputs else {}),
            **self.figures,
            "layers": self.layers,
        }
