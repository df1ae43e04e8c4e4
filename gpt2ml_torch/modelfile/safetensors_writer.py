"""A safetensors file written tensor by tensor, checked, and only then given its name.

The safetensors library serialises a whole state dict at once, which for a model that just fits in
memory is one copy too many. Here the header comes first, each tensor goes to its place as it is
ready, is read back and compared, and the finished file is renamed: a process killed at any moment
leaves what stood under the name untouched. PyTorch is not imported: it takes longer to start than
the converter takes for a small model.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from gpt2ml_torch.modelfile import disk

try:
    import fcntl
except ImportError:  # Windows, where two processes that write one file are not told so
    fcntl = None  # type: ignore[assignment]

# PyTorch's name of a dtype: what the format calls it, and bytes of a number.
DTYPES: dict[str, tuple[str, int]] = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}

ALIGNMENT = 4096  # bytes: a page, so that writing and mapping large tensors costs least

_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)  # where they exist

TensorSpec = tuple[str, Sequence[int]]  # dtype, by its name in `DTYPES`, and shape

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
        self._fd = _open_locked(self._partial)
        self._unfinished = True
        try:
            os.ftruncate(self._fd, 0)  # what a killed process left takes room
            self._check_free_space()
            disk.allocate(self._fd, self.size)
            with self._open() as file:
                self._write(file, memoryview(header))
        except BaseException:
            self.abort()
            raise

    def write_pieces(self, name: str, pieces: Iterable[Any]) -> None:
        """Write one declared tensor's bytes, from anything contiguous that has a buffer."""
        if name not in self._missing:
            state = "was written already" if name in self._specs else "was not declared"
            raise ValueError(f"tensor {name!r} {state}")
        start = self._offsets[name]
        at, end = start, start + _size(self._specs[name])
        back = bytearray(min(disk.CHUNK, end - start))
        with self._open() as file, self._open() as same:
            file.seek(start)
            same.seek(start)
            for piece in pieces:
                data = memoryview(piece).cast("B")
                if at + len(data) > end:
                    raise ValueError(f"tensor {name!r} takes {end - start} bytes; more were given")
                for chunk in disk.chunks(data):
                    self._write(file, chunk)
                    self._compare(same, chunk, back, name)
                at += len(data)
        if at != end:
            raise ValueError(f"tensor {name!r} takes {end - start} bytes; {at - start} were given")
        disk.start_writeback(self._fd, start, end - start)
        self._missing.discard(name)

    def replace_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata by others that take at most `reserve` bytes more than the first."""
        header, _, _ = _layout(self._specs, metadata)
        spare = self._header_size - len(header)
        if spare < 0:
            raise ValueError(f"the metadata take {-spare} bytes more than was reserved for them")
        text = header[8:] + b" " * spare
        with self._open() as file:
            self._write(file, memoryview(struct.pack("<Q", len(text)) + text))
        self._metadata = dict(metadata)

    def commit(self) -> None:
        """Check the whole file with the safetensors library, and give it its name."""
        if self._missing:
            raise ValueError(f"tensors never written: {', '.join(sorted(self._missing))}")
        self._check_header()
        self._guard(os.fsync, self._fd)
        if not self._overwrite and self.path.exists():  # it may have appeared meanwhile
            raise _exists(self.path)
        if fcntl is None:  # Windows renames no open file
            self._close()
        self._guard(os.replace, self._partial, self.path)
        self._unfinished = False
        self._close()
        disk.sync_directory(self.path.parent)

    def abort(self) -> None:
        """Remove what was written so far."""
        if self._unfinished:
            self._unfinished = False
            if fcntl is None:  # Windows removes no open file
                self._close()
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
        """Release the lock: last, so that nobody takes over a file that is being renamed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check_free_space(self) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < self.size:
            raise OSError(
                errno.ENOSPC,
                f"{self.path} needs {self.size:,} bytes and {self.path.parent} has {free:,} free; "
                "make room or write elsewhere",
            )

    def _open(self) -> FileIO:
        """The unfinished file, with a position of its own in it, so that threads don't meet."""
        return self._guard(open, self._partial, "r+b", buffering=0)

    def _write(self, file: FileIO, data: memoryview) -> None:
        while data:
            data = data[self._guard(file.write, data) :]

    def _compare(self, file: FileIO, written: memoryview, back: bytearray, name: str) -> None:
        count = self._guard(file.readinto, memoryview(back)[: len(written)])
        if count != len(written) or not back.startswith(written):
            raise OSError(
                errno.EIO,
                f"{self.path}: tensor {name!r} reads back differently from what was written; "
                "check the disk",
            )

    def _check_header(self) -> None:
        if os.fstat(self._fd).st_size != self.size:
            raise OSError(errno.EIO, f"{self.path}: wrote {self.size} bytes, found another size")
        try:
            with safe_open(self._partial, framework="np") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {
                    name: (part.get_dtype(), tuple(part.get_shape()))
                    for name, part in slices.items()
                }
                metadata = file.metadata()
        except SafetensorError as error:
            raise OSError(errno.EIO, f"{self.path} reads back damaged: {error}") from error
        expected = {
            name: (DTYPES[dtype][0], tuple(shape)) for name, (dtype, shape) in self._specs.items()
        }
        if found != expected or (metadata or {}) != self._metadata:
            raise OSError(errno.EIO, f"{self.path}: the header reads back differently")

    def _guard(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function of the operating system; its errors name the file and what it takes."""
        try:
            return function(*arguments, **options)
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
    sizes = {name: _size(spec) for name, spec in specs.items()}
    order = sorted(specs, key=lambda name: -_alignment(sizes[name]))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name in order:
        dtype, shape = specs[name]
        starts[name] = end
        end += sizes[name]
        entries[name] = {
            "dtype": DTYPES[dtype][0],
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


def dtype_name(dtype: Any) -> str:
    """The name in `DTYPES` of one of PyTorch's dtypes, or of what is a name already."""
    return str(dtype).removeprefix("torch.")


def _size(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    dtype, shape = spec
    return math.prod(shape) * DTYPES[dtype][1]


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
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        except OSError as error:
            raise OSError(error.errno, f"can't write {partial}: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, f"can't write {partial}: it is in the way; remove it")
        if fcntl is None:
            return fd
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
