"""Where a file or a directory grows, until it is whole and takes its name."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemoe_jax.errors import UserError

SHARD_BYTES = 2_000_000_000  # of a weight file, unless the user says otherwise


def staging_path(target: Path) -> Path:
    """The hidden place beside a target."""
    return target.parent / f".{target.name}.partial"


@contextlib.contextmanager
def atomic_write(target: Path, parents: bool = False) -> Iterator[Path]:
    """The place of a file, which takes its name if all goes well, also where there is one; otherwise nothing stays.

    Args:
        parents: make the directories that lead there.

    Raises:
        UserError: it cannot be written.
    """
    partial = staging_path(target)
    made = [parent for parent in target.parents if parents and not parent.exists()]
    try:
        if made:
            target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
            for parent in made:
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{target}: {error.strerror}") from error
        raise


def refuse_existing(directory: str | Path) -> None:
    """Raises UserError where something has that name: nothing is ever overwritten."""
    if Path(directory).exists():
        raise UserError(f"{directory}: exists already; choose another name or remove it")


def check_room(target: Path, needed: int) -> None:
    """Raises UserError where the disk of `target` has fewer than `needed` bytes free."""
    free = free_bytes(target)
    if needed > free:
        raise UserError(f"{target}: wants {needed / 1e9:,.1f} GB of disk, {free / 1e9:,.1f} GB are free there")


def free_bytes(target: Path) -> int:
    """Bytes that can be written to the disk where `target` is or would be."""
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    return shutil.disk_usage(existing).free
