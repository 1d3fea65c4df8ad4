"""Reading safetensors files piece by piece.

The header is parsed and checked here and each tensor is mapped on its own, so that its pages leave the process's
memory as soon as the view is dropped; a mapping of the whole file would keep every page that was ever read.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from nemoe_jax.errors import UserError

_DTYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


class Entry(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: str  # safetensors' own name: BF16, F16, F32, …
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class TensorFile:
    """The tensors of one safetensors file."""

    def __init__(self, path: Path):
        """Parses the header.

        Raises:
            UserError: no such file, no safetensors header, or the file is shorter than its header says.
        """
        self.path = path
        self.entries: dict[str, Entry] = {}
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header_size = int.from_bytes(file.read(8), "little")
                if size < 8 or header_size > size - 8:
                    raise UserError(f"{path}: truncated or no safetensors file: {size:,} bytes, header {header_size:,}")
                header = json.loads(file.read(header_size))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: the safetensors header is damaged ({error})") from error
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            if 8 + header_size + end > size:
                raise UserError(
                    f"{path}: truncated: tensor {name} ends at byte {8 + header_size + end:,}, the file has {size:,}"
                )
            self.entries[name] = Entry(entry["dtype"], tuple(entry["shape"]), 8 + header_size + begin)

    def view(self, name: str) -> np.ndarray:
        """A tensor mapped from disk, read-only; copy what you need and drop it.

        Raises:
            UserError: a dtype other than bf16, f16 or f32.
        """
        entry = self.entries[name]
        if entry.dtype not in _DTYPES:
            raise UserError(f"{self.path}: tensor {name} has dtype {entry.dtype}; wanted one of {', '.join(_DTYPES)}")
        if math.prod(entry.shape) == 0:
            return np.empty(entry.shape, _DTYPES[entry.dtype])
        return np.memmap(self.path, _DTYPES[entry.dtype], "r", entry.offset, entry.shape)
