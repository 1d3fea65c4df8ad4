"""Merging a LoRA adapter (Hu et al. 2021) of Hugging Face PEFT into a model: W + scale · B · A, layer by layer.

The sum is formed in float32 and cast once to the model's dtype; tensors that the adapter does not name are copied as
they are. The adapter's format is the business of nemoe_jax/adapters/peft_format.py.
"""

import hashlib
from pathlib import Path

from convert.options import MergeOptions
from convert.streaming import ConversionSettings, Figures, Manifest, Tensors, convert_layers
from nemoe_jax.adapters.peft_config import CONFIG
from nemoe_jax.adapters.peft_format import WEIGHTS, PeftAdapter
from nemoe_jax.checkpoints.reader import Checkpoint, units
from nemoe_jax.utils.output_path import refuse_existing


def merge(
    source: str | Path, destination: str | Path, options: MergeOptions, run: ConversionSettings = ConversionSettings()
) -> Manifest:
    """Merges an adapter into a model directory and writes another; returns the manifest (see convert/streaming.py).

    Raises:
        UserError: an adapter that does not fit the model or is no plain LoRA (see `PeftAdapter`), existing destination.
    """
    refuse_existing(destination)
    checkpoint = Checkpoint(source)
    adapter = PeftAdapter(options.adapter, checkpoint.config)
    adapter.check_values(progress=True)
    changed = adapter.low_rank.keys() | adapter.whole.keys()
    by_unit = units(checkpoint.config)

    def layer(number: int) -> tuple[Tensors, Figures]:
        keys = [ref.key for ref in by_unit[number + 1] if ref.key in changed]
        tensors = {key: adapter.merged(key, checkpoint.view(key)) for key in keys}
        return tensors, {"tensors_changed": len(keys)}

    recorded = {
        "command": "merge",
        "adapter": adapter.directory.resolve().name,
        "adapter_sha256": {name: _sha256(adapter.directory / name) for name in (CONFIG, WEIGHTS)},
    }
    return convert_layers(
        checkpoint,
        destination,
        checkpoint.config,
        layer,
        recorded,
        run=run,
        copy=lambda ref: adapter.merged(ref.key, checkpoint.view(ref.key)),
        summary=lambda: {"tensors_updated": len(adapter.low_rank), "tensors_replaced": len(adapter.whole)},
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def printed_figures(manifest: Manifest) -> Figures:
    return {name: manifest[name] for name in ("tensors_updated", "tensors_replaced")}
