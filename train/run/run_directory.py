"""Where a run works, and how it is told to stop.

A run works in `.NAME.partial` beside its output, which takes the name when all is done. What is there is enough to go
on after any interruption: the recipe, the log, and the checkpoints of each phase.
"""

import contextlib
import fcntl
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from nemoe_jax.checkpoints.fingerprint import weights_fingerprint
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.utils.distributed import barrier
from nemoe_jax.utils.output_path import staging_path
from train.recipe import Recipe

LOCK = "lock"
RESUMABLE_KEYS = (
    "log_every",
    "wandb",
    "mesh",
    "checkpoints",
    "max_skipped",
)  # keys that may change when a run is taken up


class Interrupted(Exception):
    """A signal asked the run to stop, and what it had is saved."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_status = 128 + number


class Signals:
    """SIGTERM and the first Ctrl-C as a request to stop that the loop asks about; use it as a context.

    Over several processes it is SIGTERM alone, to any of them, and JAX's own service that agrees on the step.
    """

    def __enter__(self) -> "Signals":
        self._number, self._before = 0, {}
        if jax.process_count() == 1:
            with contextlib.suppress(ValueError):  # not the main thread: whoever runs us there has his own
                self._before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._number:
            raise KeyboardInterrupt
        self._number = number

    def received(self, step: int) -> int:
        """The signal's number, 0 while there is none; at a step, all processes get the same answer."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._number = signal.SIGTERM
        return self._number


@contextlib.contextmanager
def run_directory(recipe: Recipe, restart: bool) -> Iterator[Path]:
    """`.NAME.partial` beside the output, new or an earlier attempt's; gone at the end, unless there is something in it
    to go on from."""
    directory = staging_path(recipe.output.absolute())
    missing = [parent for parent in directory.parents if not parent.exists()]
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(_lock(directory))
            for path in directory.iterdir() if restart else ():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        barrier("locked")
        _compare(recipe, directory)
        try:
            yield directory
        finally:
            if jax.process_index() == 0 and not any(directory.glob("checkpoints/*/*")):
                shutil.rmtree(directory, ignore_errors=True)
                with contextlib.suppress(OSError):  # not empty: the output is there, or another run's
                    for parent in missing:
                        parent.rmdir()


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Makes the directory this process's own, until it ends, however it ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("w")
    except OSError as error:
        raise UserError(f"output: {error.filename or directory}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{directory}: another process is at work there") from error
        except OSError:
            pass  # a file system that knows no locks
        yield


def _compare(recipe: Recipe, directory: Path) -> None:
    """Notes in the directory what is run there, or sees that it is what was run before."""
    state = _identity(recipe)
    kept, new = directory / "run.json", not (directory / "run.json").exists()
    if not new and (earlier := json.loads(kept.read_text("utf-8"))) != state:
        differ = [key for key in state | earlier if state.get(key) != earlier.get(key)]
        raise UserError(
            f"{directory}: holds an unfinished run of another recipe or model ({', '.join(differ)} differ); "
            "finish that one, choose another output, or throw it away with --restart"
        )
    barrier("compared")
    if jax.process_index() == 0 and new:
        kept.with_suffix(".new").write_text(json.dumps(state), "utf-8")
        kept.with_suffix(".new").rename(kept)
    barrier("working directory")
    if kept not in directory.glob("*.json"):  # listing asks anew, where NFS may remember that there was no such name
        raise UserError(f"{directory.parent}: not shared by all processes; they must see the same directory")


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What an attempt must have in common with the one that it goes on from, as JSON holds it."""
    keys = {key: value for key, value in recipe.model_dump(mode="json").items() if key not in RESUMABLE_KEYS}
    named = {recipe.model, *(phase.distill.teacher for phase in recipe.phases if phase.distill)}
    prints = {str(model): weights_fingerprint(Checkpoint(model), times=False) for model in named if model}
    return keys | {"model weights": prints}
