"""The tensors of GGUF files under the keys, in the row order and with the values of a Hugging Face directory.

A layer's experts are one tensor in GGUF; here each has an entry of its own. Quantized tensors are dequantized when
they are asked for, block by block of rows, so that no more than the result is in memory.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quant_shape_to_byte_shape

from nemoe_jax.checkpoints.gguf.config import ROPE_FREQS, family_of
from nemoe_jax.checkpoints.gguf.header import GgufHeader, GgufTensor
from nemoe_jax.checkpoints.safetensors_file import Entry
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.spec.schema import declare, leaves

PLAIN: dict[Type, Any] = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: ml_dtypes.bfloat16}
# fmt: off
QUANTIZED = (
    Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K,
    Type.IQ4_NL, Type.IQ4_XS, Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S,
    Type.TQ1_0, Type.TQ2_0, Type.MXFP4,
)
# fmt: on
_AT_ONCE = 1 << 20  # elements dequantized at once
_ROTATED = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")


def tensor_names(config: ModelConfig) -> dict[str, tuple[str, int | None]]:
    """{key of a Hugging Face directory: (name of the GGUF tensor, expert in it)} of a model."""
    architecture = FAMILIES[config.family].gguf
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.layers)
    found: dict[str, tuple[str, int | None]] = {}
    for spec in leaves(declare(config)).values():
        expert_axis = spec.stacked.index("experts") if "experts" in spec.stacked else None
        for place, key in spec.tensors():
            expert = None if expert_axis is None else place[expert_axis]
            plain = key if expert is None else key.replace(f"experts.{expert}.", "experts.", 1)
            name = names.get_name(plain, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UserError(f"the GGUF architecture {architecture} has no tensor {key}")
            found[key] = name, expert
    return found


class GgufWeights:
    """The tensors of one GGUF file, as `SafetensorsFile` has those of its file."""

    def __init__(self, path: Path, header: GgufHeader, config: ModelConfig):
        self.path = path
        self._rotated = _ROTATED if family_of(header).gguf_permutes else ()
        self._head_dim = config.head_dim
        self._parts: dict[str, GgufTensor] = {}
        mine = {name: tensor for name, tensor in header.tensors.items() if tensor.path == path and name != ROPE_FREQS}
        names = tensor_names(config)
        for key, (name, expert) in names.items():
            if name in mine:
                self._parts[key] = _expert(mine[name], expert)
        used = {name for name, _ in names.values()}
        self._parts |= {name: tensor for name, tensor in mine.items() if name not in used}  # unexpected; named so
        self.entries = {
            key: Entry(tensor.type.name, self._shape(key, tensor), tensor.offset) for key, tensor in self._parts.items()
        }

    def _shape(self, key: str, tensor: GgufTensor) -> tuple[int, ...]:
        is_row = len(tensor.shape) == 1 and key.endswith("_gate.weight")  # a map to one number
        return (1, *tensor.shape) if is_row else tensor.shape

    def dtype_problem(self, name: str) -> str | None:
        """What is wrong with a tensor's type, if anything."""
        kind = self._parts[name].type
        if kind in PLAIN or kind in QUANTIZED:
            return None
        known = ", ".join(known.name for known in itertools.chain(PLAIN, QUANTIZED))
        return f"tensor {name} has type {kind.name}; expected one of {known}"

    def view(self, name: str, dtype: Any = None) -> np.ndarray:
        """A tensor: mapped from disk as it is, or computed; quantized ones in `dtype`, or in float32."""
        tensor, shape = self._parts[name], self.entries[name].shape
        rotated = name.endswith(self._rotated) if self._rotated else False
        if tensor.type in PLAIN:
            mapped = np.memmap(self.path, PLAIN[tensor.type], "r", tensor.offset, shape)
            return _reordered(mapped, self._head_dim // 2, 2) if rotated else mapped
        byte_shape = quant_shape_to_byte_shape(tensor.shape, tensor.type)
        mapped = np.memmap(self.path, np.uint8, "r", tensor.offset, (math.prod(byte_shape[:-1]), byte_shape[-1]))
        rows = _reordered(mapped, self._head_dim // 2, 2) if rotated else mapped
        values = np.empty((len(rows), tensor.shape[-1]), dtype or np.float32)
        step = max(1, _AT_ONCE // tensor.shape[-1])
        for start in range(0, len(rows), step):
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused when it is used
                values[start : start + step] = dequantize(rows[start : start + step], tensor.type)
        return values.reshape(shape)


def _expert(tensor: GgufTensor, expert: int | None) -> GgufTensor:
    """One expert of the tensor that holds all of a layer; where it has no such axis, the tensor itself."""
    if expert is None or len(tensor.shape) != 3 or expert >= tensor.shape[0]:
        return tensor
    size = tensor.size // tensor.shape[0]
    return tensor._replace(shape=tensor.shape[1:], offset=tensor.offset + expert * size, size=size)


def interleaved(key: str, tensor: np.ndarray, head_dim: int) -> np.ndarray:
    """A tensor in llama.cpp's order of rows, where rotary pairs are neighbors: q and k copied, others as they are."""
    return _reordered(tensor, 2, head_dim // 2) if key.endswith(_ROTATED) else tensor


def _reordered(rows: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """Each head's rows, as an (outer, inner) table, in the table's other order."""
    if len(rows) % (outer * inner):
        return rows  # misshapen, and refused for it
    return rows.reshape(-1, outer, inner, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
