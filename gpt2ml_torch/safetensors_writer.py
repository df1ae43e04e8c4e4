"""A safetensors file written tensor by tensor, checked, and only then given its name.

The safetensors library serialises a whole state dict at once, which for a model that just fits in
memory is one copy too many. Here the header comes first, each tensor goes to its place as it is
ready, is read back and compared, and the finished file is renamed: a process killed at any moment
leaves what stood under the name untouched.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

ALIGNMENT = 64  # bytes: a cache line, and the widest vector load
CHUNK = 2 << 20  # bytes written, then read back while they are still in the processor's cache

TensorSpec = tuple[torch.dtype, Sequence[int]]

_Writer = TypeVar("_Writer", bound="SafetensorsWriter")  # typing.Self, before Python 3.11


class SafetensorsWriter:
    """Writes the declared tensors, in any order and from any number of threads.

    A context manager. The file is built as `NAME.partial` beside its place. Leaving the `with`
    block normally checks that every tensor was written and renames it; leaving it by an exception
    removes it. What a killed process left is written over by the next one; two live processes
    writing the same file is an error.

    Raises `OSError` where the file can't be written (`FileExistsError` if it exists and `overwrite`
    is false), and `ValueError` for a tensor that was not declared so. `reserve` is room in the
    header, in bytes, for `replace_metadata`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        *,
        overwrite: bool = False,
        reserve: int = 0,
    ) -> None:
        self.path = resolve_target(path, overwrite=overwrite)
        self._overwrite = overwrite
        self._specs = dict(specs)
        self._metadata = dict(metadata)
        header, starts, size = _layout(self._specs, self._metadata, reserve)
        self._header_size = len(header)
        self._offsets = {name: len(header) + start for name, start in starts.items()}
        self.size = len(header) + size
        self._missing = set(self._specs)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._check_free_space()
        self._fd = _open_locked(self._partial)
        try:
            os.ftruncate(self._fd, 0)
            self._write_at(0, memoryview(header))
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one declared tensor; from any device, contiguous or not."""
        if name not in self._missing:
            state = "was written already" if name in self._specs else "was not declared"
            raise ValueError(f"tensor {name!r} {state}")
        dtype, shape = self._specs[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                f"expected {dtype} of shape {tuple(shape)}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data = _memory_of(flat)
        offset = self._offsets[name]
        back = torch.empty(min(CHUNK, len(data)), dtype=torch.uint8)
        for start in range(0, len(data), CHUNK):
            piece = slice(start, min(start + CHUNK, len(data)))
            self._write_at(offset + start, data[piece])
            self._compare(name, offset + start, flat[piece], back)
        self._missing.discard(name)

    def replace_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata by others that take at most `reserve` bytes more than the first."""
        header, _, _ = _layout(self._specs, metadata)
        spare = self._header_size - len(header)
        if spare < 0:
            raise ValueError(f"the metadata take {-spare} bytes more than was reserved for them")
        text = header[8:] + b" " * spare
        self._write_at(0, memoryview(struct.pack("<Q", len(text)) + text))
        self._metadata = dict(metadata)

    def commit(self) -> None:
        """Check the whole file with the safetensors library, and give it its name."""
        if self._missing:
            raise ValueError(f"tensors never written: {', '.join(sorted(self._missing))}")
        self._check_header()
        self._guard(os.fsync, self._fd)
        if not self._overwrite and self.path.exists():  # it may have appeared meanwhile
            raise _exists(self.path)
        self._guard(os.replace, self._partial, self.path)
        self._close()
        _sync_directory(self.path.parent)

    def abort(self) -> None:
        """Remove what was written so far."""
        if self._fd >= 0:
            self._partial.unlink(missing_ok=True)
            self._close()

    def __enter__(self: _Writer) -> _Writer:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None:
                self.commit()
        finally:
            self.abort()  # does nothing after a commit

    def _close(self) -> None:
        os.close(
            self._fd
        )  # releases the lock: last, so that nobody takes over a file that is being renamed
        self._fd = -1

    def _check_free_space(self) -> None:
        usage = os.statvfs(self.path.parent)
        free = usage.f_bavail * usage.f_frsize
        if self._partial.is_file():
            free += self._partial.stat().st_blocks * 512
        if free < self.size:
            raise OSError(
                errno.ENOSPC,
                f"{self.path} needs {self.size:,} bytes and {self.path.parent} has {free:,} free; "
                "make room or write elsewhere",
            )

    def _write_at(self, offset: int, data: memoryview) -> None:
        while data:
            written = self._guard(os.pwrite, self._fd, data, offset)
            offset += written
            data = data[written:]

    def _compare(self, name: str, offset: int, written: Tensor, back: Tensor) -> None:
        back = back[: len(written)]
        count = self._guard(os.preadv, self._fd, [_memory_of(back)], offset)
        if count != len(written) or not _same_bytes(back, written):
            raise OSError(
                errno.EIO,
                f"{self.path}: tensor {name!r} reads back differently from what was written; "
                "check the disk",
            )

    def _check_header(self) -> None:
        if os.fstat(self._fd).st_size != self.size:
            raise OSError(errno.EIO, f"{self.path}: wrote {self.size} bytes, found another size")
        try:
            with safe_open(self._partial, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {
                    name: (part.get_dtype(), tuple(part.get_shape()))
                    for name, part in slices.items()
                }
                metadata = file.metadata()
        except SafetensorError as error:
            raise OSError(errno.EIO, f"{self.path} reads back damaged: {error}") from error
        expected = {
            name: (DTYPE_NAMES[dtype], tuple(shape)) for name, (dtype, shape) in self._specs.items()
        }
        if found != expected or (metadata or {}) != self._metadata:
            raise OSError(errno.EIO, f"{self.path}: the header reads back differently")

    def _guard(self, function, *arguments):  # type: ignore[no-untyped-def]
        """Call an `os` function; its errors name the file and what it takes."""
        try:
            return function(*arguments)
        except OSError as error:
            raise OSError(
                error.errno, f"writing {self.path} ({self.size:,} bytes) failed: {error.strerror}"
            ) from error


def _layout(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], reserve: int = 0
) -> tuple[bytes, dict[str, int], int]:
    """The header, each tensor's place in the data, and the data's size.

    The header is padded so that the data begin aligned. The format allows no holes, so further
    alignment comes from the order: tensors whose size keeps the next one aligned come first.
    """
    sizes = {
        name: torch.Size(shape).numel() * dtype.itemsize for name, (dtype, shape) in specs.items()
    }
    order = sorted(specs, key=lambda name: -_alignment(sizes[name]))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name in order:
        dtype, shape = specs[name]
        starts[name] = end
        end += sizes[name]
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * reserve
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, starts, end


def _alignment(size: int) -> int:
    """The largest power of two, up to `ALIGNMENT`, that divides the size."""
    return min(size & -size, ALIGNMENT) if size else ALIGNMENT


def _memory_of(flat: Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor on the CPU, without a copy."""
    return flat.numpy().data


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if len(a) % 8 == 0:  # eight times faster, where it goes
        a, b = a.view(torch.int64), b.view(torch.int64)
    return torch.equal(a, b)


def resolve_target(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The real place of a file to be written (a symbolic link stays one).

    Raises `OSError` where it can't be written, `FileExistsError` if it exists and `overwrite` is
    false.
    """
    path = Path(os.path.realpath(path))
    parent = path.parent
    if not parent.is_dir():
        what = "is not a folder" if parent.exists() else "does not exist"
        raise OSError(
            errno.ENOENT, f"can't write {path}: the folder {parent} {what}; create it first"
        )
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
        raise _exists(path)
    return path


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, f"{path} exists already")


def _open_locked(partial: Path) -> int:
    """Open or take over the unfinished file, alone."""
    while True:
        try:
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise OSError(error.errno, f"can't write {partial}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(fd), os.stat(partial))
        except FileNotFoundError:
            same = False  # whoever held it finished between our open and our lock
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise OSError(
                    errno.EBUSY, f"another process is writing {partial}; wait for it to end"
                ) from error
            raise
        if same:
            return fd
        os.close(fd)


def _sync_directory(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        pass  # some file systems can't; the data itself is safe
    finally:
        os.close(fd)
