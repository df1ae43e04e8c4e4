"""Write files fast and durably: disk space, write-back, synchronisation, locks."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2ml_torch.options import OptionFileExistsError

if TYPE_CHECKING:
    from filelock import BaseFileLock

# Bytes to write at once; they are still in the processor's cache when their checksum is computed.
# Linux makes the pages of a file as large as the writes. Pages of 1 MiB and more can take two to
# four times as long in a virtual machine, since its host has to provide the memory first.
CHUNK = 128 << 10

_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)  # where they exist


def chunks(data: memoryview) -> Iterator[memoryview]:
    """The data, `CHUNK` bytes at a time."""
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]


def allocate(fd: int, size: int) -> None:
    """Reserve space on the disk if Linux and the file system can; otherwise do nothing.

    Allocating space for each write costs a quarter of the time. Python itself has only
    `os.posix_fallocate`, which writes the whole file if the file system can't reserve space.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(size))


def start_writeback(fd: int, offset: int, size: int) -> None:
    """Start writing these bytes to the disk, so that `fsync` has little left to wait for.

    Linux does so when a process declares that it no longer needs pages of a file. The pages stay in
    memory until they are on the disk.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def sync_directory(folder: Path) -> None:
    """Make a new name in the folder survive a loss of power, if the file system supports it."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows can't open folders
    try:
        os.fsync(fd)
    except OSError:
        pass  # the data itself is safe
    finally:
        os.close(fd)


def write_synced(path: Path, text: str) -> None:
    """Write a small text file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def lock(path: Path, busy: str | None, *, patience: float = 0) -> BaseFileLock:
    """The lock file `path`, held until `unlock`.

    If another process, or another caller in this one, holds it for more than `patience` seconds,
    raises `OSError` with the message `busy`; without a message, waits for it.
    """
    from filelock import FileLock, Timeout  # PyTorch brings it

    held = FileLock(path, timeout=-1 if busy is None else patience, thread_local=False)
    try:
        held.acquire()
    except Timeout:
        raise OSError(errno.EBUSY, busy) from None
    except RuntimeError:  # filelock's error if the file system lacks flock
        raise OSError(
            errno.ENOLCK, f"can't lock {path}: its file system has no locks; write elsewhere"
        ) from None
    except OSError as error:
        raise OSError(error.errno, f"can't write {path}: {error.strerror}") from error
    return held


def unlock(held: BaseFileLock) -> None:
    """Release a lock and remove its file."""
    # Removed while held: a process that waits for the removed file notices that and starts again.
    with contextlib.suppress(OSError):  # Windows can't remove open files
        os.unlink(held.lock_file)
    held.release()


def open_new(path: Path) -> int:
    """Open an empty file for reading and writing, in place of any regular file at the path."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
    except OSError as error:
        raise OSError(error.errno, f"can't write {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, f"can't write {path}: it is in the way; remove it")
    os.ftruncate(fd, 0)  # what a killed process left would take space
    return fd


def check_room(path: Path, size: int) -> None:
    """Raise `OSError` unless the disk has room for a file of `size` bytes at `path`."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"{path} needs {size:,} bytes and {path.parent} has {free:,} free; make room or write "
            "elsewhere",
        )


def check_parent(path: Path) -> None:
    """Raise `OSError` unless the folder that is to hold `path` exists."""
    parent = path.parent
    if not parent.is_dir():
        what = "is not a folder" if parent.exists() else "does not exist"
        raise OSError(
            errno.ENOENT, f"can't write {path}: the folder {parent} {what}; create it first"
        )


def resolve_target(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The real path of a file to write; a symbolic link to it stays a link.

    Raises `OSError` if it can't be written, and `FileExistsError` if it exists and `overwrite` is
    false.
    """
    path = Path(os.path.realpath(path))
    check_parent(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(
            errno.EISDIR, f"can't write {path}: it is a folder; give the name of a file"
        )
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"can't write {path}: it is not a regular file")
    if not overwrite:
        raise OptionFileExistsError(
            "{} exists already; give another name, or {overwrite=True} to replace it", path
        )
    return path
