"""FP8 checkpoints: weights in float8_e4m3fn, each with its scales; read as w · scale, and how they are written.

Five formats are read; they differ in the names and the shapes of the scales, and in the config that announces them:

    compressed-tensors   X.weight_scale: (1,), (out, 1) or blocks of `block_structure`; X.input_scale; k_scale, v_scale
    fp8 (transformers)   X.weight_scale_inv: blocks of `weight_block_size`, or a scalar; X.activation_scale
    fp8 (vLLM, AutoFP8)  X.weight_scale: a scalar; X.input_scale
    modelopt             X.weight_scale: a scalar; X.input_scale; config.json or hf_quant_config.json
    mistral              X.qscale_weight: a scalar; X.qscale_act; k_fake_quantizer.qscale_act; params.json

Scales of keys and values go with the weights of their projections, those of other activations are checked and left
aside: activations are scaled when they are computed. Sources: compressed-tensors 0.20 (config/format.py), transformers
5 (quantizers/quantizer_finegrained_fp8.py), vLLM (model_executor/layers/quantization), ModelOpt
(export/quant_utils.py).
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from nemoe_jax.errors import UserError
from nemoe_jax.spec.fp8_weight import E4M3, MAX

ON_DISK = "F8_E4M3"  # in safetensors
MODELOPT_CONFIG = "hf_quant_config.json"
SUPPORTED = "compressed-tensors float-quantized, fp8, modelopt FP8, Mistral's fp8_e4m3"
_WEIGHT_SCALE = re.compile(r"\.(weight_scale|weight_scale_inv|qscale_weight)$")
_ACTIVATION_SCALE = re.compile(
    r"\.(input_scale|activation_scale|qscale_act|[kqv]_scale|output_scale|[kqv]_fake_quantizer\.qscale_act)$"
)


@dataclasses.dataclass(frozen=True)
class Fp8Format:
    """How a checkpoint's FP8 weights are scaled."""

    name: str
    block: tuple[int, int] | None = None  # (out, in) rows and columns that share a scale

    def scale_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes that the scales of a weight (out, in) may have."""
        if self.block:
            return [tuple(-(-size // part) for size, part in zip(shape, self.block, strict=True))]
        return [(), (1,), (1, 1), (shape[0], 1), (shape[0],)]


def scaled_weight(name: str) -> str | None:
    """The name of the weight whose scale a tensor is; None for other tensors."""
    return _WEIGHT_SCALE.sub(".weight", name) if _WEIGHT_SCALE.search(name) else None


def is_activation_scale(name: str) -> bool:
    """Whether a tensor is a scale of activations, or of keys and values."""
    return _ACTIVATION_SCALE.search(name) is not None


def scaled_projection(name: str) -> str | None:
    """The name of the projection's weight to whose keys or values a scale belongs; None for other tensors."""
    if found := re.fullmatch(r"(.*\.self_attn)\.(?:[kv]_proj\.)?([kv])_scale", name):
        return f"{found[1]}.{found[2]}_proj.weight"
    if found := re.fullmatch(r"(layers\.\d+\.attention)\.([kv])_fake_quantizer\.qscale_act", name):
        return f"{found[1]}.w{found[2]}.weight"
    return None


def activation_scale_problem(name: str, scale: np.ndarray) -> str | None:
    """What is wrong with a scale of activations, if anything."""
    values = scale.astype(np.float32)
    if scale.size and np.isfinite(values).all() and (values > 0).all():
        return None
    return (
        f"{name}: expected finite scales above 0, got {values.min()} to {values.max()}"
        if scale.size
        else f"{name}: expected a scale, got none"
    )


def format_of(directory: Path, config: dict[str, Any], source: str) -> Fp8Format | None:
    """The FP8 format that a model directory announces; None where it is not quantized.

    Args:
        config: the content of config.json or params.json, called `source` in errors.

    Raises:
        UserError: another scheme, by name.
    """
    content = config.get("quantization_config") or config.get("quantization")
    if content is None and (directory / MODELOPT_CONFIG).is_file():
        source = str(directory / MODELOPT_CONFIG)
        try:
            content = {"quant_method": "modelopt", **json.loads((directory / MODELOPT_CONFIG).read_text("utf-8"))}
        except (ValueError, TypeError) as error:
            raise UserError(f"{source}: not a JSON object ({error})") from error
    if not content:
        return None
    if not isinstance(content, dict):
        raise UserError(f"{source}: quantization_config: expected an object, got {type(content).__name__}")
    return _parse(content, f"{source}: quantization_config")


def _parse(content: dict[str, Any], where: str) -> Fp8Format:
    method = content.get("quant_method", "compressed-tensors" if "config_groups" in content else "mistral")
    if method == "compressed-tensors":
        return _compressed_tensors(content, where)
    if method == "fp8":
        block = content.get("weight_block_size")
        return Fp8Format("fp8", _block(block, f"{where}.weight_block_size") if block else None)
    if method == "modelopt":
        algorithm = content.get("quantization", content).get("quant_algo")
        if algorithm != "FP8":
            raise _unknown(where, f"modelopt {algorithm}")
        return Fp8Format("modelopt")
    if method == "mistral":
        if content.get("qformat_weight") != "fp8_e4m3":
            raise _unknown(where, f"qformat_weight {content.get('qformat_weight')}")
        return Fp8Format("mistral")
    raise _unknown(where, str(method))


def _compressed_tensors(content: dict[str, Any], where: str) -> Fp8Format:
    groups = content.get("config_groups") or {}
    if not isinstance(groups, dict) or not groups:
        raise UserError(f"{where}: config_groups: expected at least one group")
    blocks = set()
    for name, group in groups.items():
        weights = group.get("weights") or {}
        form = group.get("format") or content.get("format")
        if form not in ("float-quantized", "naive-quantized") or (weights.get("type"), weights.get("num_bits")) != (
            "float",
            8,
        ):
            got = f"compressed-tensors {form} of {weights.get('type')} {weights.get('num_bits')}"
            raise _unknown(f"{where}.config_groups.{name}", got)
        place = f"{where}.config_groups.{name}.weights"
        strategy = weights.get("strategy")
        if strategy not in ("tensor", "channel", "block"):
            raise UserError(f"{place}.strategy: expected tensor, channel or block, got {strategy}")
        is_block = strategy == "block"
        blocks.add(_block(weights.get("block_structure"), f"{place}.block_structure") if is_block else None)
    if len(blocks) > 1:
        raise UserError(f"{where}: config_groups: expected one size of blocks, got {len(blocks)}")
    return Fp8Format("compressed-tensors", blocks.pop())


def _block(value: Any, where: str) -> tuple[int, int]:
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)):
        raise UserError(f"{where}: expected two positive integers, got {value}")
    return value[0], value[1]


def _unknown(where: str, got: str) -> UserError:
    return UserError(f"{where}: {got} weights are not supported; expected {SUPPORTED}, or bf16, f16 and f32 weights")


def scale_problem(name: str, weight: str, shape: tuple[int, ...], scale: np.ndarray, form: Fp8Format) -> str | None:
    """What is wrong with the scales of an FP8 weight of a shape, if anything."""
    shapes = form.scale_shapes(shape)
    if scale.shape not in shapes:
        return f"{name}: expected the shape {' or '.join(map(str, shapes))} for {weight} {shape}, got {scale.shape}"
    values = scale.astype(np.float32)
    if not np.isfinite(values).all() or (values <= 0).any():
        return f"{name}: expected finite scales above 0, got {values.min()} to {values.max()}"
    return None


def dequantize(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int] | None = None) -> np.ndarray:
    """w · scale in float32, of an FP8 weight (out, in).

    Args:
        scale: one, one for each row (out,) or (out, 1), or with `block` one for each block of rows and columns.
    """
    return weight.astype(np.float32) * _spread(scale, weight.shape, block)


def quantize(
    weight: np.ndarray, scale_dtype: Any, *, per_row: bool = False, block: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A weight (out, in) in float8_e4m3fn, and its scales: amax / 448 of the whole, of each row or of each block.

    The scales are rounded to `scale_dtype` before the weights are divided by them. A part of zeros has the scale 1.

    Returns:
        The weight, and scales of shape (1,), (out, 1) or (blocks of rows, blocks of columns).
    """
    values = weight.astype(np.float32)
    if block:
        padding = [(0, -size % part) for size, part in zip(values.shape, block, strict=True)]
        padded = np.pad(np.abs(values), padding)
        largest = padded.reshape(len(padded) // block[0], block[0], -1, block[1]).max((1, 3))
    else:
        largest = np.abs(values).max(1, keepdims=True) if per_row else np.abs(values).max().reshape(1)
    scale = np.where(largest > 0, largest / MAX, 1).astype(scale_dtype)
    return rounded(values, _spread(scale, values.shape, block)), scale


def row_scales(weight: np.ndarray) -> np.ndarray:
    """One scale for each row of a weight (out, in), float32 (out, 1)."""
    largest = np.abs(weight).max(1, keepdims=True).astype(np.float32)
    return np.where(largest > 0, largest / np.float32(MAX), np.float32(1))


def rounded(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """A weight in float8_e4m3fn, to be multiplied by its scales."""
    return np.clip(weight.astype(np.float32) / scale, -MAX, MAX).astype(E4M3)


def by_output(scale: np.ndarray, shape: tuple[int, int], block: tuple[int, int] | None, most: int) -> np.ndarray:
    """Scales of a weight (out, in) in any of the formats as float32 (out, blocks of inputs), of equal blocks.

    Args:
        most: inputs that a block may have, and of which it must be a divisor.
    """
    rows, columns = shape
    scale = scale.astype(np.float32)
    if block is None:
        return np.broadcast_to(scale.reshape(-1, 1), (rows, 1))
    size = math.gcd(most, block[1])
    return scale[np.arange(rows)[:, None] // block[0], np.arange(0, columns, size) // block[1]]


def _spread(scale: np.ndarray, shape: tuple[int, ...], block: tuple[int, int] | None) -> np.ndarray:
    """Scales in float32 as they multiply a weight (out, in)."""
    scale = scale.astype(np.float32)
    if block is None:
        return scale.reshape(-1, 1) if scale.size > 1 else scale.reshape(())
    rows, columns = (np.arange(size) // part for size, part in zip(shape, block, strict=True))
    return scale[rows[:, None], columns]
