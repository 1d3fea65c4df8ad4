"""The safetensors format: reading files piece by piece, and the headers of files that are to be written.

The header is parsed and checked here and each tensor is mapped on its own, so that its pages leave the process's
memory as soon as the view is dropped; a mapping of the whole file would keep every page that was ever read.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from nemoe_jax.errors import UserError

_FLOATS: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
_DTYPES: dict[str, Any] = {**_FLOATS, "F8_E4M3": ml_dtypes.float8_e4m3fn}
_ALIGNMENT = 8  # bytes; of the header, and so of the first tensor
_CHECKED_AT_ONCE = 1 << 18  # elements: stays in cache


class Entry(NamedTuple):
    """A tensor's place in its file."""

    dtype: str  # safetensors' own name: BF16, F16, F32, …
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class SafetensorsFile:
    """The tensors of one safetensors file."""

    def __init__(self, path: Path):
        """Parses the header.

        Raises:
            UserError: no such file, no safetensors header, tensors that overlap or leave gaps, or the file is shorter
                than its header says.
        """
        self.path = path
        self.entries: dict[str, Entry] = {}
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header_size = int.from_bytes(file.read(8), "little")
                if size < 8 or header_size > size - 8:
                    raise UserError(f"{path}: truncated or no safetensors file: {size:,} bytes, header {header_size:,}")
                text = file.read(header_size)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        start = 8 + header_size
        for name, entry in _parse(path, text).items():
            if start + entry.end > size:
                raise UserError(
                    f"{path}: truncated: tensor {name} ends at byte {start + entry.end:,}, the file has {size:,}"
                )
            self.entries[name] = Entry(entry.dtype, entry.shape, start + entry.begin)

    @property
    def dtype(self) -> str | None:
        """NumPy's name of the dtype of most elements of 2 or 4 bytes; None where none can be read."""
        sizes = dict.fromkeys(_FLOATS, 0)
        for entry in self.entries.values():
            if entry.dtype in sizes:
                sizes[entry.dtype] += math.prod(entry.shape)
        most = max(sizes, key=sizes.__getitem__)
        return np.dtype(_DTYPES[most]).name if sizes[most] else None

    def dtype_problem(self, name: str) -> str | None:
        """What is wrong with a tensor's dtype, if anything: bf16, f16, f32 and float8_e4m3fn can be read."""
        dtype = self.entries[name].dtype
        return None if dtype in _DTYPES else f"tensor {name} has dtype {dtype}; expected one of {', '.join(_DTYPES)}"

    def view(self, name: str) -> np.ndarray:
        """A tensor mapped from disk, read-only; copy what you need and drop it.

        Raises:
            UserError: a dtype that cannot be read.
        """
        entry = self.entries[name]
        if problem := self.dtype_problem(name):
            raise UserError(f"{self.path}: {problem}")
        if math.prod(entry.shape) == 0:
            return np.empty(entry.shape, _DTYPES[entry.dtype])
        return np.memmap(self.path, _DTYPES[entry.dtype], "r", entry.offset, entry.shape)


class _HeaderEntry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the end of the header
    end: int


def _parse(path: Path, text: bytes) -> dict[str, _HeaderEntry]:
    """The tensors that a header lists, in the order of their bytes, which they fill without gaps."""
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the safetensors header is damaged ({error})") from error
    entries = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            entries[name] = _header_entry(name, entry)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: the safetensors header is damaged (tensor {name!r}: {error})") from error
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    expected = 0
    for name, entry in entries.items():
        if entry.begin != expected:
            raise UserError(
                f"{path}: the safetensors header is damaged (tensor {name} begins at byte {entry.begin:,} of the data, "
                f"the one before it ends at {expected:,})"
            )
        expected = entry.end
    return entries


def _header_entry(name: str, entry: Any) -> _HeaderEntry:
    """Raises ValueError, TypeError or KeyError on anything else than an entry of the format."""
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not (name.isprintable() and isinstance(dtype, str) and dtype.isprintable()):
        raise ValueError("not a name")  # names go into messages of one line
    whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    # other dtypes are refused when they are asked for; their size is not known here
    if not whole or end < begin or (dtype in _DTYPES and end - begin != bytes_of(dtype, shape)):
        raise ValueError(f"shape {shape} of {dtype} in bytes {begin} to {end}")
    return _HeaderEntry(dtype, shape, begin, end)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name comes twice")
    return content


def header_of(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> tuple[bytes, dict[str, int], int]:
    """The header of a file that holds tensors one after another.

    Args:
        tensors: {name: (shape, NumPy's name of the dtype)}.

    Returns:
        The header, the byte of the file where each tensor begins, and the size of the file.
    """
    names = {np.dtype(known).name: name for name, known in _DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for key, (shape, dtype) in tensors.items():
        offsets[key], end = end, end + bytes_of(names[dtype], shape)
        entries[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offsets[key], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {key: len(header) + offset for key, offset in offsets.items()}, len(header) + end


def is_finite(tensor: np.ndarray) -> bool:
    """Whether a contiguous floating-point array (2 or 4 bytes an element) holds no NaN and no infinity."""
    info = ml_dtypes.finfo(tensor.dtype)
    unsigned = np.dtype(f"u{tensor.dtype.itemsize}")
    flat = tensor.reshape(-1).view(unsigned)
    sign = unsigned.type(1 << (info.bits - 1))
    infinity = np.array(np.inf, tensor.dtype).view(unsigned)  # NaNs come after it
    starts = range(0, flat.size, _CHECKED_AT_ONCE)
    return all((flat[start : start + _CHECKED_AT_ONCE] & ~sign).max() < infinity for start in starts)


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of safetensors' dtype."""
    return math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
