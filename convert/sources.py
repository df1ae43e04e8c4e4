"""What the pipeline asks of a source, whatever its format."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from convert import mapping

Array = NDArray[Any]
Entries = Mapping[str, tuple[str | None, tuple[int, ...]]]


class Source(Protocol):
    """A checkpoint whose tensors can be read one by one, from several threads."""

    format: mapping.Format
    name: str
    entries: Entries  # dtype and shape; dtype None: no numbers
    data_files: list[Path]

    def read(self, name: str) -> Array:
        """A tensor, memory-mapped where it can be; bfloat16, which NumPy lacks, as float32."""
        ...

    def step(self) -> int | None:
        """The step of the training, if the source knows."""
        ...

    def check(self) -> None:
        """Raise `ValueError` for what is wrong with the source beyond names, dtypes and shapes."""
        ...


def storage(dtype: str) -> np.dtype[Any]:
    """The NumPy type that holds such numbers in files; bfloat16, which NumPy lacks, as its bits."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype).newbyteorder("<")


def widened(bits: Array) -> Array:
    """Bfloat16, by its bits, as float32, whose upper half it is."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def mapped(path: Path, offset: int, size: int) -> memoryview:
    """Bytes of a file, without a copy; they take memory only as long as they are held.

    Raises `ValueError` where the file has become shorter.
    """
    if size == 0:
        return memoryview(b"")
    skipped = offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        memory = mmap.mmap(
            file.fileno(), size + skipped, access=mmap.ACCESS_READ, offset=offset - skipped
        )
    return memoryview(memory)[skipped:]
