"""Writing model directories: every tensor straight to its place in a weight file, under a temporary name.

The config says all shapes, so the header of every file is known before the first tensor is: files are laid out at
once, and tensors come in any order, from several threads or processes. They grow in `.NAME.partial/model` beside the
target, which takes the target's name when all is written. What is finished is remembered by units (the embedding, each
layer, norm and head): a job that was interrupted, even by SIGKILL, goes on after the last of them, and its files come
out the same byte for byte.
"""

import errno
import json
import math
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nemoe_jax.checkpoints.layout import HUGGING_FACE, Layout
from nemoe_jax.checkpoints.reader import TensorRef, units
from nemoe_jax.checkpoints.safetensors_file import SafetensorsFile, header_of, is_finite
from nemoe_jax.errors import ResumableError, UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.utils.distributed import barrier
from nemoe_jax.utils.file_copy import write_at
from nemoe_jax.utils.output_path import SHARD_BYTES, check_room, refuse_existing, staging_path

TOKENIZER_FILES = (
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
_STATE = "state.json"
_FINISHED = "finished-{}.jsonl"  # one for each process
KEPT = "what is finished is kept; the same command goes on from there"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def carry_tokenizer(source: str | Path, directory: Path) -> None:
    """Copies the tokenizer, chat templates and generation settings of a model directory."""
    for pattern in TOKENIZER_FILES:
        for path in sorted(Path(source).glob(pattern)):
            copy = directory / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


class WeightFile(NamedTuple):
    """A safetensors file that is to be written."""

    name: str
    units: tuple[int, ...]
    header: bytes
    offsets: dict[str, int]  # {tensor: byte of the file where it begins}
    size: int  # bytes


def plan(config: ModelConfig, shard_bytes: int = SHARD_BYTES, layout: Layout = HUGGING_FACE) -> list[WeightFile]:
    """The weight files of a model: whole units up to about `shard_bytes`, and at least one."""
    by_unit = units(config)

    def stored(unit: int) -> dict[str, tuple[tuple[int, ...], str]]:
        parts = (layout.stored(ref.spec, layout.name(ref.key), config.dtype) for ref in by_unit[unit])
        return {name: tensor for part in parts for name, tensor in part.items()}

    groups: list[list[int]] = []
    filled = 0
    for unit in range(len(by_unit)):
        size = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in stored(unit).values())
        if not groups or filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += size
    files = []
    for number, group in enumerate(groups, 1):
        name = layout.single if len(groups) == 1 else layout.shard(number, len(groups))
        header, offsets, size = header_of({name: tensor for unit in group for name, tensor in stored(unit).items()})
        files.append(WeightFile(name, tuple(group), header, offsets, size))
    return files


class Writer:
    """Writes a model directory unit by unit; use it as a context.

    With `state` (all that the job depends on) the finished units of an interrupted job are kept and found again by the
    next Writer with the same state; without it, or when the input is bad, nothing is left. Several processes of one
    `jax.distributed` job may write to one shared directory, each its own units; all of them enter, finish and leave.
    """

    def __init__(
        self,
        directory: str | Path,
        config: ModelConfig,
        shard_bytes: int = SHARD_BYTES,
        state: dict[str, Any] | None = None,
        layout: Layout = HUGGING_FACE,
    ):
        """Lays the files out.

        Raises:
            UserError: the directory exists, cannot be made, or the disk has no room for it.
        """
        self.target = Path(directory)
        self.partial = staging_path(self.target)
        self.model = self.partial / "model"
        self.config, self.state = config, None if state is None else json.loads(json.dumps(state))
        self.layout, self.files = layout, plan(config, shard_bytes, layout)
        self.finished: dict[int, Any] = {}  # unit -> what `write` was given to remember
        self._lock = threading.Lock()
        self._file_of_unit = {unit: file for file in self.files for unit in file.units}
        self._parents = [parent for parent in self.target.parents if not parent.exists()]
        refuse_existing(self.target)
        barrier("lay out")
        if jax.process_index() == 0:
            self._lay_out()
        barrier("laid out")
        if not (self.partial / _STATE).exists():
            raise UserError(f"{self.target.parent}: not shared by all processes; they must see the same directory")
        self._read_finished()

    def _lay_out(self) -> None:
        if self.state is None or self._found_state() != self.state:
            shutil.rmtree(self.partial, ignore_errors=True)
        check_room(self.target, sum(file.size for file in self.files) - _bytes_in(self.model))
        try:
            self.model.mkdir(parents=True, exist_ok=True)
            for file in self.files:
                with (self.model / file.name).open("ab") as opened:
                    if opened.tell() == 0:
                        opened.write(file.header)
                    opened.truncate(file.size)
            (self.partial / _STATE).write_text(json.dumps(self.state), encoding="utf-8")
            for path in self.partial.glob(_FINISHED.format("*")):
                if not path.read_bytes().endswith(b"\n"):  # killed in the midst of a line
                    path.write_bytes(path.read_bytes() + b"\n")
        except OSError as error:
            if error.errno in _FULL:
                raise ResumableError(f"{self.partial}: {error.strerror}; {KEPT}") from error
            self._remove()
            raise UserError(f"{error.filename or self.partial}: {error.strerror}") from error

    def _found_state(self) -> Any:
        try:
            return json.loads((self.partial / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _read_finished(self) -> None:
        for path in self.partial.glob(_FINISHED.format("*")):
            for line in path.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # cut short when the job was killed: the unit is written again
                self.finished[row["unit"]] = row["figures"]

    def write(self, unit: int, tensors: Mapping[str, np.ndarray], figures: Any = None) -> None:
        """Writes all tensors of a unit, cast to the config's dtype, and remembers that it is finished.

        Raises:
            UserError: a tensor holds NaN or infinity.
            ResumableError: no room on the disk; what is finished is kept.
        """
        file = self._file_of_unit[unit]
        try:
            descriptor = os.open(self.model / file.name, os.O_WRONLY)
            try:
                for ref in units(self.config)[unit]:
                    for name, tensor in self._encoded(ref, tensors[ref.key]).items():
                        write_at(descriptor, file.offsets[name], np.ascontiguousarray(tensor))
            finally:
                os.close(descriptor)
            row = json.dumps({"unit": unit, "figures": figures}) + "\n"
            with self._lock, (self.partial / _FINISHED.format(jax.process_index())).open("a") as finished:
                finished.write(row)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise ResumableError(f"{self.model / file.name}: {error.strerror}; {KEPT}") from error
        self.finished[unit] = figures

    def _encoded(self, ref: TensorRef, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """What a tensor is written as."""
        key, shape = ref.key, ref.spec.torch_shape
        tensor = self.layout.to_disk(key, tensor, self.config.head_dim)
        with np.errstate(over="ignore"):  # what is too large for the dtype is refused below
            dtype = jnp.dtype(self.config.dtype)
            if tensor.dtype != dtype or not tensor.flags.c_contiguous:
                tensor = np.ascontiguousarray(tensor, dtype)
        assert tensor.shape == shape, f"{key}: expected {shape}, got {tensor.shape}"
        if not is_finite(tensor):
            raise UserError(f"{key}: NaN or infinite values")
        return self.layout.encode(ref.spec, self.layout.name(key), tensor)

    def read(self, unit: int) -> dict[str, np.ndarray]:
        """The tensors of a finished unit as `write` was given them, cast; mapped where their layout is that on disk."""
        file = SafetensorsFile(self.model / self._file_of_unit[unit].name)
        layout, head_dim = self.layout, self.config.head_dim
        return {
            ref.key: layout.from_disk(ref.key, file.view(layout.name(ref.key)), head_dim)
            for ref in units(self.config)[unit]
        }

    def wait(self) -> None:
        """Returns when every process has written its units; all of them are in `finished` then."""
        barrier("written")
        self._read_finished()
        barrier("read")  # before the first process takes the files away
        assert self.finished.keys() == self._file_of_unit.keys()

    def finish(self, tokenizer_from: str | Path | None = None, extra: Mapping[str, str] | None = None) -> None:
        """Writes the config, the index and `extra` text files, carries the tokenizer along, names the directory."""
        self.wait()
        if jax.process_index() == 0:
            content = self.layout.content(self.config)
            texts = {self.layout.config_file: json.dumps(content, indent=2) + "\n", **(extra or {})}
            if "auto_map" in content and (modeling := FAMILIES[self.config.family].modeling):
                texts[modeling] = Path(__file__).with_name(modeling).read_text(encoding="utf-8")
            if len(self.files) > 1:
                weight_map = {key: file.name for file in self.files for key in file.offsets}
                total = sum(file.size - len(file.header) for file in self.files)
                texts[self.layout.index] = json.dumps(
                    {"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2
                )
            for name, text in texts.items():
                (self.model / name).write_text(text, encoding="utf-8")
            if tokenizer_from is not None:
                carry_tokenizer(tokenizer_from, self.model)
            self.model.rename(self.target)
            shutil.rmtree(self.partial)
        barrier("named")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        bad_input = kind is not None and issubclass(kind, UserError) and not issubclass(kind, ResumableError)
        if kind is not None and (self.state is None or bad_input):
            self._remove()

    def _remove(self) -> None:
        """The partial directory, and the parents that were made for it."""
        shutil.rmtree(self.partial, ignore_errors=True)
        for parent in self._parents:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()


def _bytes_in(directory: Path) -> int:
    """Bytes on disk of a directory's files (holes are not counted)."""
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir()) if directory.exists() else 0
