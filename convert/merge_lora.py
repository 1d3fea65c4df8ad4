"""Merging a LoRA adapter (Hu et al. 2021) of PEFT or mistral-finetune into a model: W + scale · B · A, layer by layer.

The sum is formed in float32 and cast once to the model's dtype; tensors that the adapter does not name are copied as
they are. The adapter's format is the business of nemoe_jax/adapters/peft_format.py.
"""

import hashlib
import shutil
from pathlib import Path

import numpy as np

from convert.options import MergeOptions
from convert.streaming import ConversionSettings, Figures, Manifest, Tensors, convert_layers
from nemoe_jax.adapters.peft_format import PeftAdapter
from nemoe_jax.checkpoints.reader import EMBEDDING, HEAD, Checkpoint, units
from nemoe_jax.utils.output_path import refuse_existing


def merge(
    source: str | Path, destination: str | Path, options: MergeOptions, run: ConversionSettings = ConversionSettings()
) -> Manifest:
    """Merges an adapter into a model directory and writes another; returns the manifest (see convert/manifest.py).

    Raises:
        UserError: an adapter that does not fit the model or is no plain LoRA (see `PeftAdapter`), existing destination.
    """
    refuse_existing(destination)
    checkpoint = Checkpoint(source)
    adapter = PeftAdapter(options.adapter, checkpoint.config, merging=True, resize_vocab=options.resize_vocab)
    adapter.check_values(progress=True)
    changed = adapter.low_rank.keys() | adapter.whole.keys() | adapter.biases.keys() | adapter.rows.keys()
    by_unit = units(adapter.model)

    def merged(key: str) -> np.ndarray:
        # a head that was tied is the embedding
        return adapter.merged(key, checkpoint.view(key if key in checkpoint.files or key != HEAD else EMBEDDING))

    def layer(number: int) -> tuple[Tensors, Figures]:
        keys = [ref.key for ref in by_unit[number + 1] if ref.key in changed]
        tensors = {key: merged(key) for key in keys}
        return tensors, {"tensors_changed": len(keys)}

    recorded = {
        "command": "merge",
        "adapter": adapter.directory.resolve().name,
        "adapter_sha256": {path.name: _sha256(path) for path in adapter.paths},
    }
    tokenizer = adapter.directory if options.resize_vocab and _has_tokenizer(adapter.directory) else None
    manifest = convert_layers(
        checkpoint,
        destination,
        adapter.model,
        layer,
        recorded,
        run=run,
        copy=lambda ref: merged(ref.key),
        tokenizer_from=tokenizer,
        summary=lambda: {"tensors_updated": len(adapter.low_rank), "tensors_replaced": len(adapter.whole)},
    )
    generation = checkpoint.directory / "generation_config.json"
    if tokenizer is not None and generation.is_file() and not run.dry_run:
        shutil.copyfile(generation, Path(destination) / generation.name)
    return manifest


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tekken.json"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def printed_figures(manifest: Manifest) -> Figures:
    return {name: manifest.figures[name] for name in ("tensors_updated", "tensors_replaced")}
