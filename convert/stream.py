"""The streaming engine that every conversion runs on: read a layer, transform it, write it.

A conversion says what a layer of the result is made of that the source does not hold as it stands; everything else is
copied, tensor by tensor. Memory holds one shard of the result, whatever the model. The result grows in a directory
beside the target and takes its name when complete; a job that was interrupted goes on at its first unfinished shard
when it is started again with the same options.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nemoe_jax.command import progress_bar
from nemoe_jax.config import ModelConfig
from nemoe_jax.hf import SHARD_BYTES, Checkpoint, Writer, units

MANIFEST = "conversion.json"

Tensors = dict[str, np.ndarray]  # {checkpoint key: tensor in the checkpoint's layout}
Figures = dict[str, Any]
Layer = Callable[[int], tuple[Tensors, Figures]]  # layer number -> its new tensors, and figures for the manifest


def stream(
    source: Checkpoint,
    destination: str | Path,
    config: ModelConfig,
    layer: Layer,
    options: dict[str, Any],
    *,
    description: str,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the model directory `destination` of shape `config`; returns its manifest.

    The manifest (conversion.json beside the weights) holds the options, a fingerprint of the source and the figures of
    each layer.

    Raises:
        UserError: the destination exists, or the source turns out bad; nothing is left behind then.
    """
    state = {
        "options": options,
        "source": str(source.directory.resolve()),
        "source_fingerprint": fingerprint(source),
        "result": dataclasses.asdict(config),
        "shard_bytes": shard_bytes,
    }
    by_unit = units(config)
    with (
        resumable(),
        Writer(destination, config, shard_bytes, state=json.loads(json.dumps(state))) as writer,
        progress_bar() as bar,
    ):
        figures_file = writer.partial / "figures.jsonl"
        task = bar.add_task(description, total=config.layers)
        done = [shard for shard in writer.shards if shard not in writer.pending]
        bar.advance(task, sum(1 <= unit <= config.layers for shard in done for unit in shard.units))
        for shard in writer.pending:
            tensors: Tensors = {}
            figures = []
            for unit in shard.units:
                if 1 <= unit <= config.layers:
                    new, layer_figures = layer(unit - 1)
                    tensors |= new
                    figures.append({"layer": unit - 1, **layer_figures})
                    bar.advance(task)
                tensors |= {ref.key: source.view(ref.key) for ref in by_unit[unit] if ref.key not in tensors}
            with figures_file.open("a", encoding="utf-8") as file:  # before the shard: a finished one has its figures
                file.writelines(json.dumps(row) + "\n" for row in figures)
            writer.write(shard, tensors)
        rows = {row["layer"]: row for row in map(json.loads, figures_file.read_text(encoding="utf-8").splitlines())}
        manifest = {**state, "layers": [rows[number] for number in sorted(rows)]}
        (writer.partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        figures_file.unlink()
        writer.finish(tokenizer_from=source.directory)
    return manifest


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Tells whoever interrupts a conversion how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what is finished is kept; the same command goes on from there") from None


def fingerprint(source: Checkpoint) -> str:
    """A hash of config.json and of every tensor's name, dtype, shape and place, and the files' sizes and times.

    It tells a changed source without reading gigabytes of weights.
    """
    digest = hashlib.sha256((source.directory / "config.json").read_bytes())
    for file in sorted(set(source.files.values()), key=lambda file: file.path.name):
        status = file.path.stat()
        digest.update(repr((file.path.name, status.st_size, status.st_mtime_ns, file.entries)).encode())
    return digest.hexdigest()
