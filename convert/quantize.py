"""Quantize: a model's linear maps in FP8, in the formats that other programs open; or FP8 back in bfloat16.

What is quantized: attention's projections, dense FFNs and experts. Routers, the shared expert's gate, embeddings, head
and norms stay as they are. The weights of each row, block or matrix are divided by max |w| / 448 and rounded to
float8_e4m3fn (checkpoints/fp8). Static scales of activations, keys and values come from calibration text
(activation_scales).
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.activation_scales import FEWEST_TOKENS, KEYS, VALUES, ActivationScales
from convert.layerwise import calibration_batches, hash_of
from convert.options import QuantizeOptions
from convert.streaming import ConversionSettings, Figures, Manifest, Tensors, convert_layers
from nemoe_jax.checkpoints import fp8
from nemoe_jax.checkpoints.layout import HUGGING_FACE, MISTRAL, Layout
from nemoe_jax.checkpoints.reader import Checkpoint, units
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.fp8_weight import is_quantized
from nemoe_jax.spec.schema import ParamSpec, declare, leaves
from nemoe_jax.utils.output_path import refuse_existing

BLOCK = 128


def quantize(
    source: str | Path,
    destination: str | Path,
    options: QuantizeOptions,
    run: ConversionSettings = ConversionSettings(),
) -> Manifest:
    """Writes a model directory in FP8, or back in bfloat16; returns the manifest (see convert/manifest.py).

    Raises:
        UserError: not a model directory, a model that the format cannot hold, existing destination.
    """
    _refuse(options)
    checkpoint = Checkpoint(source)
    config = checkpoint.config
    scales: dict[str, float] = {}  # {a scale's name on disk: its value}, of one layer after another
    if options.to == "bf16":
        config, layout = config.replace(dtype="bfloat16"), HUGGING_FACE
    else:
        try:
            layout = _FORMATS[options.to](config, options, scales)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
    described = {"command": "quantize", **dataclasses.asdict(options)}
    if not options.calibration:
        return convert_layers(
            checkpoint, destination, config, lambda layer: ({}, {}), described, run=run, layout=layout
        )
    refuse_existing(destination)  # before the text is read
    batches = calibration_batches(checkpoint, options.calibration, options.calibration_tokens)
    activations = ActivationScales(checkpoint, batches)
    names = _SCALE_NAMES[options.to]

    def layer(number: int) -> tuple[Tensors, Figures]:
        found, figures = activations.measure(number)
        scales.clear()
        for key, scale in found.items():
            if key in (KEYS, VALUES):
                projection = layout.name(f"model.layers.{number}.self_attn.k_proj.weight")
                scales[names.of_cache(projection, key)] = scale
            else:
                scales[names.of_input(layout.name(key))] = scale
        return {}, figures

    return convert_layers(
        checkpoint,
        destination,
        config,
        layer,
        described,
        run=run,
        finished=lambda number, tensors: activations.pass_by(number),
        layout=layout,
        inputs=hash_of(batches),
    )


def _refuse(options: QuantizeOptions) -> None:
    """Raises where calibration text is missing, or is of no use."""
    if options.kv_cache and options.to in ("fp8-block", "bf16"):
        raise UserError(f"--kv-cache: --to {options.to} has no scales of keys and values; expected another format")
    needs = "--to fp8-static" if options.to == "fp8-static" else "--kv-cache" if options.kv_cache else ""
    if needs and not options.calibration:
        raise UserError(f"{needs}: expected --calibration text to measure activations on")
    if options.calibration and not needs and options.to != "mistral":
        raise UserError(f"--calibration: --to {options.to} without --kv-cache has no scales to measure")


def _kept(config: ModelConfig) -> list[str]:
    """The linear modules that stay as they are, by their names on disk and, where it is another, in transformers 5."""
    names = ["lm_head"]
    for refs in units(config):
        for ref in refs:
            if ref.spec.transposed and not is_quantized(ref.spec):
                name = ref.key.removesuffix(".weight")
                names += [name, name.replace(".block_sparse_moe.", ".mlp.")]
    return list(dict.fromkeys(names))


@dataclasses.dataclass(frozen=True)
class _ScaleNames:
    """What a format calls its scales, in the place of a weight's last part or of an attention's projection."""

    weight: str
    input: str = ""
    keys: str = ""
    values: str = ""

    def of_weight(self, name: str) -> str:
        return name.removesuffix("weight") + self.weight

    def of_input(self, name: str) -> str:
        return name.removesuffix("weight") + self.input

    def of_cache(self, projection: str, what: str) -> str:
        return f"{projection.rsplit('.', 2)[0]}.{self.keys if what == KEYS else self.values}"


_COMPRESSED_TENSORS = _ScaleNames("weight_scale", "input_scale", "k_scale", "v_scale")
_SCALE_NAMES = {
    "fp8-dynamic": _COMPRESSED_TENSORS,
    "fp8-static": _COMPRESSED_TENSORS,
    "fp8-block": _ScaleNames("weight_scale_inv"),
    "mistral": _ScaleNames("qscale_weight", "qscale_act", "k_fake_quantizer.qscale_act", "v_fake_quantizer.qscale_act"),
}


def _fp8_layout(
    base: Layout,
    options: QuantizeOptions,
    content: dict[str, Any],
    scales: dict[str, float],
    *,
    block: int = 0,
    per_row: bool = False,
    scale_dtype: str,
) -> Layout:
    """A layout whose linear maps are in FP8.

    Args:
        content: what the config file holds beside the model's shape.
        scales: those of activations are taken from here while a layer is written.
        block: rows and columns that share a scale; 0 for one scale, or with `per_row` one for each row.
    """
    form = fp8.Fp8Format("", (block, block) if block else None)
    names = _SCALE_NAMES[options.to]
    static = bool(options.calibration) and options.to in ("fp8-static", "mistral")

    def of_activations(spec: ParamSpec, name: str) -> list[str]:
        found = [names.of_input(name)] if static else []
        what = {"attn/k": KEYS, "attn/v": VALUES}.get("/".join(spec.path.split("/")[-2:]))
        if options.kv_cache and what:
            found.append(names.of_cache(name, what))
        return found

    def stored(spec: ParamSpec, name: str, dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
        if not is_quantized(spec):
            return base.stored(spec, name, dtype)
        shape = spec.torch_shape
        of_scales = form.scale_shapes(shape)[0] if block else ((shape[0], 1) if per_row else (1,))
        return {
            name: (shape, "float8_e4m3fn"),
            names.of_weight(name): (of_scales, scale_dtype),
            **{scale: ((1,), scale_dtype) for scale in of_activations(spec, name)},
        }

    def encode(spec: ParamSpec, name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
        if not is_quantized(spec):
            return base.encode(spec, name, tensor)
        dtype = jnp.dtype(scale_dtype)
        weight, scale = fp8.quantize(tensor, dtype, per_row=per_row, block=form.block)
        measured = {scale: np.full(1, scales[scale], dtype) for scale in of_activations(spec, name)}
        return {name: weight, names.of_weight(name): scale, **measured}

    return dataclasses.replace(
        base, content=lambda config: base.content(config) | content, stored=stored, encode=encode
    )


def _compressed_tensors(config: ModelConfig, options: QuantizeOptions, scales: dict[str, float]) -> Layout:
    static = options.to == "fp8-static"
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    whole = {**number, "strategy": "tensor", "dynamic": False}
    group = {
        "targets": ["Linear"],
        "format": "float-quantized",
        "weights": whole if static else {**number, "strategy": "channel", "dynamic": False},
        "input_activations": whole if static else {**number, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    content = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": _kept(config),
        "config_groups": {"group_0": group},
    }
    if options.kv_cache:
        content["kv_cache_scheme"] = whole
    # the package creates scales in the model's dtype
    return _fp8_layout(
        HUGGING_FACE, options, {"quantization_config": content}, scales, per_row=not static, scale_dtype=config.dtype
    )


def _block(config: ModelConfig, options: QuantizeOptions, scales: dict[str, float]) -> Layout:
    size = block_size(config)
    content = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [size, size],
        "modules_to_not_convert": _kept(config),
    }
    return _fp8_layout(
        HUGGING_FACE, options, {"quantization_config": content}, scales, block=size, scale_dtype="float32"
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


def _mistral(config: ModelConfig, options: QuantizeOptions, scales: dict[str, float]) -> Layout:
    MISTRAL.content(config)  # raises where it cannot hold the model
    scheme = "TENSOR" if options.calibration else "NO_SCALES"
    content = {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": scheme}}
    return _fp8_layout(MISTRAL, options, content, scales, scale_dtype="float32")


_FORMATS = {
    "fp8-dynamic": _compressed_tensors,
    "fp8-static": _compressed_tensors,
    "fp8-block": _block,
    "mistral": _mistral,
}


def printed_figures(manifest: Manifest) -> Figures:
    return {"to": manifest.options["to"], "layers": len(manifest.layers)}


def last_words(manifest: Manifest) -> str:
    """Names the experts that saw too few tokens."""
    few = [
        f"layer {layer['layer']}: {', '.join(layer['experts_with_few_tokens'])}"
        for layer in manifest.layers
        if layer.get("experts_with_few_tokens")
    ]
    if not few:
        return ""
    return (
        f"experts that saw fewer than {FEWEST_TOKENS} tokens have the largest scales of their layer's experts "
        f"({'; '.join(few)}); more --calibration-tokens may reach them"
    )
