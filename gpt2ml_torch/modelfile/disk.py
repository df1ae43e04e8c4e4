"""How large files get to the disk soonest, and for good."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Bytes to write at once: they are still in the processor's cache to be read back. Linux makes as
# large pages of the file as the writes are, and those of 1 MiB and more can cost a virtual machine
# two to four times the time, since its host has to provide them first.
CHUNK = 128 << 10


def chunks(data: memoryview) -> Iterator[memoryview]:
    """The data, `CHUNK` bytes at a time."""
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]


def allocate(fd: int, size: int) -> None:
    """Take room on the disk, where Linux and the file system can: finding it for each write costs a
    quarter of the time. Where they can't, nothing is lost.

    Python has `os.posix_fallocate` alone, which writes the whole file where the file system can't.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(size))


def start_writeback(fd: int, offset: int, size: int) -> None:
    """Let the disk begin with what was written, so that little is left for `fsync` to wait for.

    On Linux that is what giving up interest in the file's pages does; they stay in memory, since
    they aren't on the disk yet.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def sync_directory(folder: Path) -> None:
    """Make the new name survive a loss of power, where the file system can."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows opens no folder
    try:
        os.fsync(fd)
    except OSError:
        pass  # the data itself is safe
    finally:
        os.close(fd)
