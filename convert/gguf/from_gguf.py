"""From GGUF: a model of llama.cpp's as a Hugging Face directory, its weights dequantized, its tokenizer written out.

Every command reads GGUF files, so this is for other programs, and for what is read more often than once. What a file
is made of is read by `nemoe_jax/checkpoints/gguf`.
"""

import dataclasses
from pathlib import Path

from convert.options import FromGgufOptions
from convert.streaming import ConversionSettings, Figures, Manifest, convert_layers
from nemoe_jax.checkpoints.gguf.naming import is_gguf
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError


def from_gguf(
    source: str | Path,
    destination: str | Path,
    options: FromGgufOptions = FromGgufOptions(),
    run: ConversionSettings = ConversionSettings(),
) -> Manifest:
    """Writes a GGUF file as a model directory; returns the manifest (see convert/manifest.py).

    Raises:
        UserError: not a GGUF file, damaged, of an architecture, type or tokenizer that is not known; existing
            destination.
    """
    if not is_gguf(source):
        raise UserError(f"{source}: not a GGUF file")
    checkpoint = Checkpoint(source)
    config = checkpoint.config
    if options.dtype != "auto":
        config = config.replace(dtype=options.dtype)
    return convert_layers(
        checkpoint,
        destination,
        config,
        lambda layer: ({}, {}),
        {"command": "from-gguf", **dataclasses.asdict(options)},
        run=run,
    )


def printed_figures(manifest: Manifest) -> Figures:
    return {"family": manifest.result.family, "dtype": manifest.result.dtype, "layers": len(manifest.layers)}
