"""Checkpoints of a running phase, by Orbax: asynchronous, atomic, the newest and the best kept.

A checkpoint holds the training state (what is trained, the optimizer, the counts, the RNG key) and beside it, as JSON,
the state of the data iterator and a checksum of every array. Checksums do not depend on the mesh: a checkpoint is
restored onto any, and one whose arrays were damaged on the disk is found out, left aside with a warning, and the one
before it taken. What fails for another reason (permissions, memory) is reported, and nothing set aside. A checkpoint
that the disk has no room for is a warning: the run goes on from memory.
"""

import contextlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from nemoe_jax.errors import ResumableError, UserError, listed
from train import recipe
from train.step.step import TrainState

METRIC = "held_out_loss"
FULL = re.compile(r"No space left|ENOSPC|Disk quota exceeded", re.IGNORECASE)
NOT_DAMAGE = re.compile(
    r"PermissionError|PERMISSION_DENIED|Permission denied|MemoryError|RESOURCE_EXHAUSTED|Too many open files",
    re.IGNORECASE,
)


class Checkpoints:
    """The checkpoints of one phase; use it as a context, which waits for what is still being written."""

    def __init__(self, directory: Path, options: recipe.Checkpoints):
        best = BestN(
            get_metric_fn=lambda metrics: metrics[METRIC], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        self.every, self.directory = options.every, directory.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(options.keep), best]), cleanup_tmp_directories=True
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._without_room_a_warning():
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, iterator: Any, held_out_loss: float | None = None, wait: bool = False) -> None:
        """Starts to write a checkpoint of the state's step, unless there is one; returns as soon as arrays are copied.

        Args:
            iterator: the data iterator's state, which JSON can hold.
            held_out_loss: measured at this step; the checkpoint of the lowest is kept.
            wait: return only when it is written.
        """
        step = int(state.step)
        if step not in self._manager.all_steps():
            arrays = _flat(state)
            beside = {"iterator": iterator, "checksums": {name: int(sum_) for name, sum_ in _checksums(arrays).items()}}
            metrics = None if held_out_loss is None else {METRIC: held_out_loss}
            items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), beside=ocp.args.JsonSave(beside))
            with self._without_room_a_warning():
                self._manager.save(step, args=items, metrics=metrics, force=True)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written."""
        with self._without_room_a_warning():
            self._manager.wait_until_finished()

    @property
    def steps(self) -> list[int]:
        """The steps that there are checkpoints of."""
        return sorted(self._manager.all_steps())

    @contextlib.contextmanager
    def _without_room_a_warning(self) -> Iterator[None]:
        """A full disk, also one that an earlier asynchronous save met, is a line on standard error."""
        try:
            yield
        except Exception as error:
            if not _says(error, FULL):
                raise
            reason = (str(error) or type(error).__name__).partition("\n")[0]
            print(f"warning: {self.directory}: checkpoint not saved, the run goes on: {reason}", file=sys.stderr)

    def restore(self, like: TrainState, only: int | None = None) -> tuple[TrainState, Any] | None:
        """(state, the data iterator's state) of the newest checkpoint that is whole; None where there is none.

        Args:
            like: a state of the same shapes, each array where the restored one is to lie.
            only: the step of the only checkpoint to try.

        Raises:
            UserError: there are checkpoints, but none can be read.
            ResumableError: one cannot be read, though it need not be damaged.
        """
        wanted = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
            for name, array in _flat(like).items()
        }
        damaged: dict[int, str] = {}
        for step in reversed(self.steps) if only is None else [only]:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), beside=ocp.args.JsonRestore())
            try:
                restored = self._manager.restore(step, args=items)
                arrays, beside = restored["state"], restored["beside"]
                changed = [name for name, sum_ in _checksums(arrays).items() if int(sum_) != beside["checksums"][name]]
                problem = f"{changed[0]} is not what was saved" if changed else ""
            except Exception as error:  # whatever a damaged file makes Orbax raise
                problem = (str(error) or type(error).__name__).partition("\n")[0]
                if _says(error, NOT_DAMAGE):
                    raise ResumableError(f"{self.directory / str(step)}: cannot be read now: {problem}") from error
            if not problem:
                for other, what in damaged.items():
                    print(f"warning: {self.directory / str(other)}: damaged checkpoint: {what}", file=sys.stderr)
                    self._forget(other)
                return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted]), beside[
                    "iterator"
                ]
            damaged[step] = problem
        if damaged:
            problems = listed([f"{step}: {problem}" for step, problem in damaged.items()])
            raise UserError(f"{self.directory}: no checkpoint can be read ({problems}); --restart begins anew")
        return None

    def _forget(self, step: int) -> None:
        """Puts a damaged checkpoint aside, so that its step can be saved again."""
        if jax.process_index() == 0:
            aside = self.directory.with_name(f"{self.directory.name}.damaged")
            shutil.rmtree(aside / str(step), ignore_errors=True)
            aside.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(aside / str(step))
        ocp.multihost.sync_global_processes("forget")
        self._manager.reload()


def _says(error: BaseException | None, pattern: re.Pattern[str]) -> bool:
    """Whether an error, or one that it came from, is of that kind; Orbax wraps what the system says."""
    while error is not None:
        if pattern.search(f"{type(error).__name__}: {error}"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _flat(state: TrainState) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): array for path, array in jax.tree_util.tree_leaves_with_path(state)}


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def bits(array: jax.Array) -> jax.Array:
        kind = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        return jnp.sum(jax.lax.bitcast_convert_type(array, kind).astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(bits, arrays)


def _checksums(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """The sum modulo 2^32 of each array's bits: whatever the order and the mesh, the same."""
    return jax.device_get(_sums(arrays))
