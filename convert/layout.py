"""Layout: the same model in Mistral's own layout or in Hugging Face's, or in an architecture that others know.

Every command reads Hugging Face's layout and Mistral's, so this is for other programs: mistral-inference and its kin
want params.json and consolidated.safetensors. Nothing changes but names and the order of the rows of q and k
(checkpoints/mistral_format): there and back, every tensor is the same bit for bit. MoEs with a shared expert become
Qwen3-Next or Ernie 4.5 MoE, with the same logits (native_layouts); that is for other programs alone.
"""

import dataclasses
import sys
from pathlib import Path

from convert.native_layouts import ERNIE, QWEN3_NEXT, native_layout
from convert.options import LayoutOptions
from convert.streaming import ConversionSettings, Figures, Manifest, convert_layers
from nemoe_jax.checkpoints.layout import HUGGING_FACE, MISTRAL
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError

_LAYOUTS = {"huggingface": HUGGING_FACE, "mistral": MISTRAL}


def change_layout(
    source: str | Path, destination: str | Path, options: LayoutOptions, run: ConversionSettings = ConversionSettings()
) -> Manifest:
    """Writes a model directory in a layout; returns the manifest (see convert/manifest.py).

    Raises:
        UserError: not a model directory, a model that the layout cannot hold, existing destination.
    """
    checkpoint = Checkpoint(source)
    try:
        native = options.to in (QWEN3_NEXT, ERNIE)
        layout = native_layout(options.to, checkpoint) if native else _LAYOUTS[options.to]
        layout.content(checkpoint.config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if layout is MISTRAL:  # those who read it look for one file
        run = dataclasses.replace(run, shard_bytes=sys.maxsize)
    described = {"command": "layout", **dataclasses.asdict(options)}
    return convert_layers(
        checkpoint, destination, checkpoint.config, lambda layer: ({}, {}), described, run=run, layout=layout
    )


def printed_figures(manifest: Manifest) -> Figures:
    return {"layout": manifest.options["to"], "layers": len(manifest.layers)}
