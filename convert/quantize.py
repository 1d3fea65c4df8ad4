"""Quantize: a model's linear maps in FP8, in the formats that other programs open; or FP8 back in bfloat16.

What is quantized: attention's projections, dense FFNs and experts. Routers, the shared expert's gate, embeddings, head
and norms stay as they are. The weights of each row, block or matrix are divided by max |w| / 448 and rounded to
float8_e4m3fn (checkpoints/fp8).
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.options import QuantizeOptions
from convert.streaming import ConversionSettings, Figures, Manifest, convert_layers
from nemoe_jax.checkpoints import fp8
from nemoe_jax.checkpoints.layout import HUGGING_FACE, MISTRAL, Layout
from nemoe_jax.checkpoints.reader import Checkpoint, units
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import ParamSpec, declare, leaves

BLOCK = 128
_QUANTIZED = ("q", "k", "v", "o", "gate", "up", "down")


def quantize(
    source: str | Path,
    destination: str | Path,
    options: QuantizeOptions,
    run: ConversionSettings = ConversionSettings(),
) -> Manifest:
    """Writes a model directory in FP8, or back in bfloat16; returns the manifest (see convert/streaming.py).

    Raises:
        UserError: not a model directory, a model that the format cannot hold, existing destination.
    """
    checkpoint = Checkpoint(source)
    config = checkpoint.config
    if options.to == "bf16":
        config, layout = config.replace(dtype="bfloat16"), HUGGING_FACE
    else:
        try:
            layout = _LAYOUTS[options.to](config)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
    described = {"command": "quantize", **dataclasses.asdict(options)}
    return convert_layers(checkpoint, destination, config, lambda layer: ({}, {}), described, run=run, layout=layout)


def is_quantized(spec: ParamSpec) -> bool:
    """Whether an array is written in FP8."""
    return spec.transposed and spec.path.rpartition("/")[2] in _QUANTIZED


def _kept(config: ModelConfig) -> list[str]:
    """The linear modules that stay as they are, by their names on disk and, where it is another, in transformers 5."""
    names = ["lm_head"]
    for refs in units(config):
        for ref in refs:
            if ref.spec.transposed and not is_quantized(ref.spec):
                name = ref.key.removesuffix(".weight")
                names += [name, name.replace(".block_sparse_moe.", ".mlp.")]
    return list(dict.fromkeys(names))


def _fp8_layout(
    base: Layout, scales: str, content: dict[str, Any], *, block: int = 0, per_row: bool = False, scale_dtype: str
) -> Layout:
    """A layout whose linear maps are in FP8.

    Args:
        scales: the name of the scales beside a weight, for `weight`.
        content: what the config file holds beside the model's shape.
        block: rows and columns that share a scale; 0 for one scale, or with `per_row` one for each row.
    """
    form = fp8.Fp8Format("", (block, block) if block else None)

    def stored(spec: ParamSpec, name: str, dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
        if not is_quantized(spec):
            return base.stored(spec, name, dtype)
        shape = spec.torch_shape
        of_scales = form.scale_shapes(shape)[0] if block else ((shape[0], 1) if per_row else (1,))
        return {name: (shape, "float8_e4m3fn"), _scales_of(name): (of_scales, scale_dtype)}

    def encode(spec: ParamSpec, name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
        if not is_quantized(spec):
            return base.encode(spec, name, tensor)
        weight, scale = fp8.quantize(tensor, jnp.dtype(scale_dtype), per_row=per_row, block=form.block)
        return {name: weight, _scales_of(name): scale}

    def _scales_of(name: str) -> str:
        return name.removesuffix("weight") + scales

    return dataclasses.replace(
        base, content=lambda config: base.content(config) | content, stored=stored, encode=encode
    )


def _dynamic(config: ModelConfig) -> Layout:
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "format": "float-quantized",
        "weights": {**number, "strategy": "channel", "dynamic": False},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    content = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": _kept(config),
        "config_groups": {"group_0": group},
    }
    # the package creates scales in the model's dtype
    return _fp8_layout(
        HUGGING_FACE, "weight_scale", {"quantization_config": content}, per_row=True, scale_dtype=config.dtype
    )


def _block(config: ModelConfig) -> Layout:
    size = block_size(config)
    content = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [size, size],
        "modules_to_not_convert": _kept(config),
    }
    return _fp8_layout(
        HUGGING_FACE, "weight_scale_inv", {"quantization_config": content}, block=size, scale_dtype="float32"
    )


def block_size(config: ModelConfig) -> int:
    """Rows and columns that share a scale: 128, or the largest power of two below that divides every width.

    Partial blocks are legal, but transformers takes the size of a block from the numbers of rows and of scales, and
    joins the scales of gate and up; with either, a partial block's neighbors would get the wrong scales.

    Raises:
        UserError: only blocks of fewer than 16 would do.
    """
    widths = {size for spec in leaves(declare(config)).values() if is_quantized(spec) for size in spec.torch_shape}
    size = math.gcd(BLOCK, *widths)
    if size < 16:
        raise UserError(
            f"fp8-block: expected widths that are multiples of 16, got {', '.join(map(str, sorted(widths)))}; "
            "--to fp8-dynamic takes any width"
        )
    return size


def _mistral(config: ModelConfig) -> Layout:
    MISTRAL.content(config)  # raises where it cannot hold the model
    content = {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}}
    return _fp8_layout(MISTRAL, "qscale_weight", content, scale_dtype="float32")


_LAYOUTS = {"fp8-dynamic": _dynamic, "fp8-block": _block, "mistral": _mistral}


def printed_figures(manifest: Manifest) -> Figures:
    return {"to": manifest["options"]["to"], "layers": len(manifest["layers"])}
