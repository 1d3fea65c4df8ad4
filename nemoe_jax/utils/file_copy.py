"""Writing an array to its place in a file; where it is mapped from another file, the system copies it there itself."""

import errno
import mmap
import os

import numpy as np

_BLOCK = 1 << 24  # bytes in one write
_NOT_THERE = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # between some file systems, on some systems


def write_at(descriptor: int, offset: int, array: np.ndarray) -> None:
    """Writes all bytes of a contiguous array from that byte of the file on.

    Raises:
        OSError: the disk is full, or worse.
    """
    done = _copy_mapped(descriptor, offset, array) if isinstance(array, np.memmap) and is_mapped_whole(array) else 0
    data = array.reshape(-1).view(np.uint8).data[done:]
    offset += done
    while data:
        written = os.pwrite(descriptor, data[:_BLOCK], offset)
        offset, data = offset + written, data[written:]


def is_mapped_whole(array: np.ndarray) -> bool:
    """Whether an array is all that `np.memmap` mapped, not a part or a copy of it: only then its place is known."""
    return isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap)


def _copy_mapped(descriptor: int, offset: int, array: np.memmap) -> int:
    """Copies between files without the bytes passing through this process; returns how many were."""
    if array.filename is None or not hasattr(os, "copy_file_range"):  # other systems than Linux
        return 0
    done = 0
    source = os.open(array.filename, os.O_RDONLY)
    try:
        while done < array.nbytes:
            copied = os.copy_file_range(source, descriptor, array.nbytes - done, array.offset + done, offset + done)
            if not copied:
                break
            done += copied
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
    finally:
        os.close(source)
    return done
