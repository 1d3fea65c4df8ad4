"""The header of a GGUF file: its metadata, and where its tensors are; of a split model, those of all its files.

The gguf package's own reader takes seconds for a vocabulary and believes what a file says. This one checks every
length against the bytes that are there before anything is allocated.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from nemoe_jax.checkpoints.gguf.naming import MAGIC, SPLIT_NAME
from nemoe_jax.errors import UserError

VERSIONS = (2, 3)
_MOST_AXES = 4
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "|b1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file."""

    path: Path
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # outermost axis first, as NumPy has it
    offset: int  # bytes from the start of the file
    size: int  # bytes


class GgufHeader(NamedTuple):
    """What a GGUF model says of itself."""

    paths: list[Path]  # of all its files, the first one first
    metadata: dict[str, Any]  # numbers, strings, lists of strings, NumPy arrays
    tensors: dict[str, GgufTensor]


def read_header(path: str | Path) -> GgufHeader:
    """The header of a GGUF model; any file of a split one stands for all.

    Raises:
        UserError: no such file, no GGUF file, damaged or truncated, or a file of a split model is missing.
    """
    paths = _all_files(Path(path))
    metadata, tensors = _read_file(paths[0])
    count = metadata.get("split.count", 0) or len(paths)
    if count != len(paths):
        raise UserError(
            f"{paths[0]}: file 1 of {count}, but its name says {len(paths)} (expected NAME-00001-of-{count:05d}.gguf)"
        )
    for number, other in enumerate(paths[1:], 1):
        more, others = _read_file(other)
        if more.get("split.no") != number:
            raise UserError(f"{other}: expected split.no = {number}, got {more.get('split.no')}")
        if twice := tensors.keys() & others.keys():
            raise UserError(f"{other}: tensor {min(twice)} is in an earlier file of the split model as well")
        tensors |= others
    total = metadata.get("split.tensors.count", len(tensors))
    if len(paths) > 1 and total != len(tensors):
        raise UserError(f"{paths[0]}: expected {total} tensors in {len(paths)} files, got {len(tensors)}")
    return GgufHeader(paths, metadata, tensors)


def _all_files(path: Path) -> list[Path]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    named = SPLIT_NAME.match(path.name)
    if not named:
        return [path]
    count = int(named["count"])
    paths = []
    for number in range(1, count + 1):
        file = path.with_name(f"{named['stem']}-{number:05d}-of-{named['count']}.gguf")
        if not file.is_file():
            raise UserError(f"{file}: file {number} of {count} of the split model {named['stem']} is missing")
        paths.append(file)
    return paths or [path]


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """The metadata and the tensors of one file."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{path}: not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _parse(path, _Bytes(path, mapped))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


class _Bytes:
    """The bytes of a file, taken one value after another."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.size, self.at = path, len(data), len(MAGIC)
        self._data = data

    def take(self, size: int) -> bytes:
        if size > self.size - self.at:
            raise UserError(f"{self.path}: truncated or damaged: the header goes on after byte {self.size:,}, its last")
        self.at += size
        return self._data[self.at - size : self.at]

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        data = self.take(self.unsigned(8))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a string before byte {self.at:,} is not UTF-8") from error

    def value(self) -> Any:
        number = self.unsigned(4)
        if number == GGUFValueType.ARRAY:
            return self._array()
        return self.text() if number == GGUFValueType.STRING else self._numbers(number, 1)[0].item()

    def _array(self) -> Any:
        number, length = self.unsigned(4), self.unsigned(8)
        if number != GGUFValueType.STRING:
            return self._numbers(number, length)
        if length > (self.size - self.at) // 8:
            raise self.damaged(f"a list of {length:,} strings before byte {self.at:,}")
        return [self.text() for _ in range(length)]

    def _numbers(self, number: int, length: int) -> np.ndarray:
        if number not in _SCALARS:
            raise self.damaged(f"a value of unknown type {number} before byte {self.at:,}")
        dtype = np.dtype(_SCALARS[GGUFValueType(number)])
        return np.frombuffer(self.take(length * dtype.itemsize), dtype)

    def damaged(self, why: str) -> UserError:
        return UserError(f"{self.path}: the GGUF header is damaged ({why})")


def _parse(path: Path, data: _Bytes) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    (version,) = struct.unpack("<I", data.take(4))
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        what = "a big-endian file" if swapped else f"version {version}"
        raise UserError(f"{path}: expected a little-endian GGUF file of version 2 or 3, got {what}")
    tensor_count, value_count = data.unsigned(8), data.unsigned(8)
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        name = _name(data)
        if name in metadata:
            raise data.damaged(f"{name} comes twice")
        metadata[name] = data.value()
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise data.damaged(f"general.alignment: expected a power of 2, got {alignment!r}")
    found: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
    for _ in range(tensor_count):
        name = _name(data)
        if name in found:
            raise data.damaged(f"tensor {name} comes twice")
        found[name] = _tensor_info(name, data)
    start = -(-data.at // alignment) * alignment
    return metadata, _placed(path, data, found, start, alignment)


def _name(data: _Bytes) -> str:
    name = data.text()
    if not name or not name.isprintable():
        raise data.damaged(f"a name that cannot be printed before byte {data.at:,}")
    return name


def _tensor_info(name: str, data: _Bytes) -> tuple[GGMLQuantizationType, tuple[int, ...], int]:
    axes = data.unsigned(4)
    if not 1 <= axes <= _MOST_AXES:
        raise data.damaged(f"tensor {name}: {axes} axes")
    shape = tuple(data.unsigned(8) for _ in range(axes))[::-1]
    number, offset = data.unsigned(4), data.unsigned(8)
    if number not in set(GGMLQuantizationType):
        raise UserError(f"{data.path}: tensor {name}: unknown type {number}")
    return GGMLQuantizationType(number), shape, offset


def _placed(
    path: Path,
    data: _Bytes,
    found: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]],
    start: int,
    alignment: int,
) -> dict[str, GgufTensor]:
    """The tensors with their place in the file, which they fill one after another."""
    tensors, expected = {}, 0
    for name, (kind, shape, offset) in sorted(found.items(), key=lambda item: item[1][2]):
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block or not all(shape):
            raise data.damaged(f"tensor {name}: shape {shape} of {kind.name}, which has blocks of {block}")
        if offset != expected:
            raise data.damaged(f"tensor {name} begins at byte {offset:,} of the data, expected {expected:,}")
        size = math.prod(shape) // block * block_bytes
        if start + offset + size > data.size:
            raise UserError(
                f"{path}: truncated: tensor {name} ends at byte {start + offset + size:,}, the file has {data.size:,}"
            )
        tensors[name] = GgufTensor(path, kind, shape, start + offset, size)
        expected = -(-(offset + size) // alignment) * alignment
    return tensors
