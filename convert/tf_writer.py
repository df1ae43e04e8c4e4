"""Writing a TensorFlow V2 checkpoint, one tensor in memory at a time.

TensorFlow's own op, SaveV2, wants all tensors at once, which for the published size is 5.5 GB. The
data file holds them end to end; `convert.bundle` makes the index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from crc32c import crc32c

from convert import bundle
from convert.locate import Location
from convert.sources import Array, storage
from convert.table import mask
from convert.tf_source import TFSource
from gpt2ml_torch.modelfile import disk


@dataclasses.dataclass(frozen=True)
class Variable:
    """One variable: its dtype, its shape, and a function that makes its values, piece by piece,
    when they are wanted."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Array]]

    @classmethod
    def of(cls, value: Any) -> Variable:
        """An array at hand."""
        array = np.asarray(value)
        return cls(array.dtype.name, array.shape, lambda: [np.ascontiguousarray(array)])


def write_tf_checkpoint(
    prefix: Path,
    variables: Mapping[str, Variable],
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `PREFIX.index` and `PREFIX.data-00000-of-00001`.

    What was written is read back and compared by its checksum. Not atomic: write into a folder of
    its own and rename. Raises `OSError`.
    """
    entries: dict[str, bundle.Entry] = {}
    offset = 0
    with _opened(prefix, ".data-00000-of-00001") as data:
        disk.allocate(data.fileno(), sum(map(_size, variables.values())))
        for name, variable in sorted(variables.items()):
            size = checksum = 0
            for piece in variable.pieces():
                content = piece.reshape(-1).view(np.uint8).data
                for chunk in disk.chunks(content):
                    data.write(chunk)
                checksum = crc32c(content, checksum)
                size += len(content)
            disk.start_writeback(data.fileno(), offset, size)
            entries[name] = bundle.Entry(
                dtype=variable.dtype,
                shape=variable.shape,
                offset=offset,
                size=size,
                crc32c=mask(checksum),
            )
            offset += size
            if progress:
                progress(size)
    with _opened(prefix, ".index") as index:
        index.write(bundle.write_index(entries))
    _read_back(prefix, entries)


def _size(variable: Variable) -> int:
    """Bytes of a variable."""
    return math.prod(variable.shape) * storage(variable.dtype).itemsize


@contextlib.contextmanager
def _opened(prefix: Path, suffix: str) -> Iterator[BinaryIO]:
    """A new file, on the disk when it is left; errors name it."""
    path = prefix.with_name(prefix.name + suffix)
    try:
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"writing {path} failed: {error.strerror}") from None


def _read_back(prefix: Path, entries: Mapping[str, bundle.Entry]) -> None:
    """Read every tensor as any reader would, which compares it with its checksum."""
    try:
        source = TFSource(Location(prefix, "tf"))
        if source.entries != {name: (entry.dtype, entry.shape) for name, entry in entries.items()}:
            raise ValueError("the index reads back differently")
        for name in entries:
            source.read(name)
    except ValueError as error:
        raise OSError(errno.EIO, f"{prefix} reads back damaged: {error}") from None
