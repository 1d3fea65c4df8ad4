"""From GGUF: a model of llama.cpp's as a Hugging Face directory, its weights dequantized, its tokenizer written out.

Every command reads GGUF files, so this is for other programs, and for what is read more often than once. What a file
is made of is read by `nemoe_jax/checkpoints/gguf`.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from convert.command import Conversion, option
from convert.streaming import ConversionSettings, Figures, Manifest, convert_layers
from nemoe_jax.checkpoints.gguf.header import is_gguf
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class FromGgufOptions:
    """How the model is written."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "of the weights; auto is that of the file, and bfloat16 where they are quantized (float32 keeps every value)",
    )


def from_gguf(
    source: str | Path,
    destination: str | Path,
    options: FromGgufOptions = FromGgufOptions(),
    run: ConversionSettings = ConversionSettings(),
) -> Manifest:
    """Writes a GGUF file as a model directory; returns the manifest (see convert/streaming.py).

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


def _figures(manifest: Manifest) -> Figures:
    result = manifest["result"]
    return {"family": result["family"], "dtype": result["dtype"], "layers": len(manifest["layers"])}


FROM_GGUF = Conversion(
    "from-gguf",
    from_gguf,
    FromGgufOptions,
    "write a GGUF file of llama.cpp's as a model directory",
    "Llama, Mistral, Mixtral, Qwen2 and Qwen3 models in any type that the gguf package dequantizes: F32, F16, BF16,\n"
    "Q4_0 to Q8_0, Q2_K to Q6_K, IQ types. Of a split model, any file stands for all. Tokenizer, chat templates, and\n"
    "end tokens become files of the directory. Every other command takes a .gguf file for a directory as well.",
    _figures,
    source_help="GGUF file",
)
