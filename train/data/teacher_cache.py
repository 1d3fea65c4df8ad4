"""A teacher's predictions on disk: of each target that counts, the k likeliest tokens with their log-probabilities.

    DIRECTORY/PHASE/meta.json                  teacher, k, temperature and row length, which must be the recipe's
    DIRECTORY/PHASE/SOURCE-NUMBER/             a shard: of rows NUMBER · 64 and the 63 after, those that are visited
        rows.npy, crc.npy                      (R,) which they are, and a CRC-32 of each one's tokens and targets
        offsets.npy                            (R + 1,) row r has targets offsets[r] … offsets[r + 1]
        ids.npy, logprobs.npy                  (N, k) uint16 or uint32, and float16

A shard is written under a temporary name and takes its own when complete. What all other tokens have together is what
the k leave.

Letters: R rows, N targets, T tokens of a row, K tokens that are kept.
"""

import dataclasses
import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nemoe_jax.errors import UserError
from train.data.packing import Batch, Packed

ROWS = 64  # of a shard
FILES = ("rows", "crc", "offsets", "ids", "logprobs")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherBatch(Batch):
    """A `Batch` with a teacher's predictions; or a single row."""

    teacher_ids: Any  # (B, T, K) int32; 0 where the target does not count
    teacher_logprobs: Any  # (B, T, K) float32


def crc(row: Batch) -> int:
    """A checksum of a row's tokens, targets and documents."""
    value = 0
    for array in row:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def shard_path(directory: Path, source: int, number: int) -> Path:
    """Where a shard is."""
    return directory / f"{source}-{number:06d}"


def open_shard(path: Path) -> dict[str, np.ndarray] | None:
    """A shard's arrays, the large ones as maps; None where there is none, or it is damaged."""
    try:
        shard = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in FILES}
    except (OSError, ValueError):
        return None
    whole = len(shard["offsets"]) == len(shard["rows"]) + 1 and shard["offsets"][-1] == len(shard["ids"])
    return shard if whole else None


def write_shard(path: Path, rows: Sequence[int], made: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> None:
    """Writes a shard.

    Args:
        made: of each row its checksum, ids (N, K) and log-probabilities (N, K).

    Raises:
        UserError: the disk does not take it.
    """
    arrays = {
        "rows": np.array(rows, np.int64),
        "crc": np.array([sum_ for sum_, _, _ in made], np.uint32),
        "offsets": np.cumsum([0, *(len(ids) for _, ids, _ in made)]),
        "ids": np.concatenate([ids for _, ids, _ in made]),
        "logprobs": np.concatenate([logprobs for _, _, logprobs in made]).astype(np.float16),
    }
    new = path.with_name(f".{path.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(new / f"{name}.npy", array)
        shutil.rmtree(path, ignore_errors=True)
        new.rename(path)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"distill.offline: {path.parent}: {error.strerror}") from error


def check_meta(directory: Path, meta: dict[str, Any], create: bool = False) -> None:
    """Compares what a directory was made from with what is wanted of it.

    Args:
        create: note it in the directory where that is new.

    Raises:
        UserError: there is nothing, or something of another teacher, k, temperature or row length.
    """
    path = directory / "meta.json"
    if create and not path.exists():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(meta, indent=2) + "\n", "utf-8")
        except OSError as error:
            raise UserError(f"distill.offline: {directory}: {error.strerror}") from error
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"distill.offline: {directory}: no cached teacher; nemoe-train cache-teacher makes it"
        ) from error
    differ = [
        f"{key}: expected {value}, got {found.get(key)}" for key, value in meta.items() if found.get(key) != value
    ]
    if differ:
        raise UserError(f"distill.offline: {directory}: made otherwise ({'; '.join(differ)}); give another directory")


class TeacherRows:
    """A source's rows with the teacher's predictions; `rows[i]` makes row i."""

    def __init__(self, packed: Packed, directory: Path, source: int, visited: Sequence[int], top_k: int):
        """Raises UserError where a row that will be visited has no predictions."""
        self.packed, self.top_k, self.figures = packed, top_k, packed.figures
        self._places: dict[int, tuple[dict[str, np.ndarray], int]] = {}
        self._directory = directory
        for number in sorted({row // ROWS for row in visited}):
            if shard := open_shard(shard_path(directory, source, number)):
                self._places |= {int(row): (shard, at) for at, row in enumerate(shard["rows"])}
        missing = [row for row in visited if row not in self._places]
        if missing:
            raise UserError(
                f"distill.offline: {directory}: no predictions for {len(missing)} rows of data.train.{source}, "
                f"such as row {missing[0]}; nemoe-train cache-teacher goes on where it stopped"
            )

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, row: int) -> TeacherBatch:
        """Row `row`; raises UserError where its tokens are not those that the teacher read."""
        batch, length = self.packed[row], self.packed.sequence_length
        ids = np.zeros((length, self.top_k), np.int32)
        logprobs = np.zeros((length, self.top_k), np.float32)
        if row in self._places:  # those that were read ahead may lie behind the last step
            shard, at = self._places[row]
            if crc(batch) != shard["crc"][at]:
                raise UserError(
                    f"distill.offline: {self._directory}: row {row} is of other text than the teacher read; "
                    "give another directory"
                )
            own = slice(int(shard["offsets"][at]), int(shard["offsets"][at + 1]))
            counts = batch.mask > 0
            ids[counts], logprobs[counts] = shard["ids"][own], shard["logprobs"][own]
        return TeacherBatch(**vars(batch), teacher_ids=ids, teacher_logprobs=logprobs)
