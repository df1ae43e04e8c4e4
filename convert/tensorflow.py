"""A TensorFlow checkpoint, read and written one tensor at a time.

TensorFlow's own operation for writing, SaveV2, needs all tensors in memory at once, 5.5 GB at the
published size. `convert.bundle` reads and makes the index; the data files hold the tensors one
after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convert import bundle, mapping, published
from convert.inputs import tf_data_files
from convert.source import Array, Source, Stored, mapped, storage_dtype, widened
from gpt2ml_torch import disk, foreign
from gpt2ml_torch.modelfile.checksum import crc32c

_MAX_INDEX = 64 << 20  # bytes; the published indexes have 26 KB


class TensorFlowCheckpoint(Source):
    """One checkpoint, by its prefix; `read` verifies the CRC-32C that TensorFlow stores.

    Raises `OSError`, with the expected size, for missing or truncated files, and `ValueError` for
    damaged ones.
    """

    layouts = (mapping.TENSORFLOW,)
    checksum = "CRC-32C"

    def __init__(self, prefix: Path) -> None:
        self._prefix = prefix
        shards, self._entries = _read_index(prefix.with_name(prefix.name + ".index"))
        tensors = {name: Stored(entry.dtype, entry.shape) for name, entry in self._entries.items()}
        super().__init__(prefix.name, self._data_files(shards), tensors)
        self._check_sizes()

    def read(self, name: str) -> Array:
        entry = self._entries[name]
        assert entry.dtype is not None
        data = mapped(self.files[entry.shard], entry.offset, entry.size)
        if bundle.mask(crc32c(data)) != entry.crc32c:
            raise ValueError(
                f"tensor {name!r} of {self._prefix} is damaged: its checksum is wrong; fetch the "
                "checkpoint again"
            )
        array = np.frombuffer(data, storage_dtype(entry.dtype)).reshape(entry.shape)
        return widened(array) if entry.dtype == "bfloat16" else array

    def step(self) -> int | None:
        names = [name for name in self._entries if name.rpartition("/")[2] == mapping.TF_STEP]
        if len(names) == 1 and self.tensors[names[0]] == Stored("int64", ()):
            return int(self.read(names[0]))
        return None

    def _data_files(self, count: int) -> list[Path]:
        """The data files of the index; files of another number of shards are ignored."""
        folder, prefix = self._prefix.parent, self._prefix.name
        paths = [folder / f"{prefix}.data-{i:05d}-of-{count:05d}" for i in range(count)]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            names = ", ".join(path.name for path in missing[:5])
            if reason := foreign.absence_of(missing[0]):
                raise FileNotFoundError(reason)
            found = [path.name for path in tf_data_files(self._prefix) if path not in paths]
            others = f"; found {', '.join(found[:5])}, of another number of shards" if found else ""
            raise FileNotFoundError(f"{folder}/{names} is missing{others}{self._size_of_missing()}")
        strays = [path.name for path in tf_data_files(self._prefix) if path not in paths]
        if strays:
            self.notes = (f"{', '.join(strays[:5])} does not belong to it and was ignored",)
        return paths

    def _size_of_missing(self) -> str:
        """How large the missing data should be."""
        size = sum(entry.size for entry in self._entries.values())
        known = published.by_size(size)
        of = f" of the published {known.name}" if known else ""
        return f"; the index expects {size:,} bytes of data{of}, {len(self._entries):,} entries"

    def _check_sizes(self) -> None:
        expected: dict[int, int] = defaultdict(int)
        for entry in self._entries.values():
            expected[entry.shard] = max(expected[entry.shard], entry.offset + entry.size)
        for shard, size in expected.items():
            path = self.files[shard]
            found = path.stat().st_size
            if partial := foreign.unfinished(path):
                raise OSError(
                    f"{path} isn't complete: {partial.name} beside it shows that the download has "
                    "not finished; finish it"
                )
            if found < size:
                foreign.check(path, text=found == 0)
                raise OSError(
                    f"{path} is truncated: found {found:,} bytes, the index expects {size:,}; "
                    "fetch it again"
                )


def _read_index(path: Path) -> tuple[int, dict[str, bundle.Entry]]:
    foreign.check(path)
    try:
        if path.stat().st_size > _MAX_INDEX:
            raise ValueError(f"it has more than {_MAX_INDEX:,} bytes")
        return bundle.read_index(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or no TensorFlow checkpoint: {error}; fetch it again"
        ) from None


@dataclasses.dataclass(frozen=True)
class Variable:
    """One variable: its dtype, its shape, and a function that yields its values in pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Array]]

    @classmethod
    def of(cls, value: Any) -> Variable:
        """The variable of an array in memory."""
        array = np.asarray(value)
        return cls(array.dtype.name, array.shape, lambda: [np.ascontiguousarray(array)])


def write_checkpoint(
    prefix: Path,
    variables: Mapping[str, Variable],
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `PREFIX.index` and `PREFIX.data-00000-of-00001`, with a CRC-32C for each tensor.

    `progress` is called with the bytes of each tensor written. Not atomic: write into a folder of
    its own and rename. Raises `OSError`.
    """
    entries: dict[str, bundle.Entry] = {}
    offset = 0
    with _opened(prefix, ".data-00000-of-00001") as data:
        disk.allocate(data.fileno(), sum(map(_size, variables.values())))
        for name, variable in sorted(variables.items()):
            size, checksum = _write(data, variable)
            disk.start_writeback(data.fileno(), offset, size)
            entries[name] = bundle.Entry(
                dtype=variable.dtype,
                shape=variable.shape,
                offset=offset,
                size=size,
                crc32c=bundle.mask(checksum),
            )
            offset += size
            if progress:
                progress(size)
    with _opened(prefix, ".index") as index:
        index.write(bundle.write_index(entries))


def _write(data: BinaryIO, variable: Variable) -> tuple[int, int]:
    """Write a variable's values; returns their bytes and CRC-32C."""
    size = checksum = 0
    for piece in variable.pieces():
        content = piece.reshape(-1).view(np.uint8).data
        for chunk in disk.chunks(content):
            data.write(chunk)
            checksum = crc32c(chunk, checksum)
        size += len(content)
    return size, checksum


def _size(variable: Variable) -> int:
    """The bytes of a variable."""
    return math.prod(variable.shape) * storage_dtype(variable.dtype).itemsize


@contextlib.contextmanager
def _opened(prefix: Path, suffix: str) -> Iterator[BinaryIO]:
    """A new file, synced to the disk at the end of the block; errors name it."""
    path = prefix.with_name(prefix.name + suffix)
    try:
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"writing {path} failed: {error.strerror}") from None
