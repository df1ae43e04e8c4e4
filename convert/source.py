"""A checkpoint as a source of arrays, independent of its file format; and work on the arrays.

Arrays are mapped from files, put into row order and rounded.
"""

from __future__ import annotations

import dataclasses
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.mapping import Layout

Array = NDArray[Any]

_ROWS, _COLUMNS = 256, 256  # size of a block that stays in the processor's caches
_GAP = 16  # elements after each line of the block
_PIECE = 512 << 10  # bytes
_LARGEST = {
    "float32": float(np.finfo(np.float32).max),
    "float16": float(np.finfo(np.float16).max),
    "bfloat16": float.fromhex("0x1.FEp127"),
}
_INFINITY = {  # bits
    "float64": 0x7FF0000000000000,
    "float32": 0x7F800000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor as the checkpoint declares it."""

    dtype: str | None  # None if the tensor can't be read
    shape: tuple[int, ...]
    instead: str = "no numbers"  # what it is, if it can't be read


class Source(ABC):
    """A checkpoint whose tensors are read one by one, possibly from several threads.

    `files` are the files that hold the weights.
    """

    layouts: Sequence[Layout]  # the families of names that occur in this format
    checksum: str | None  # the kind of checksum that `read` verifies, if the format has one
    notes: tuple[str, ...] = ()  # for the user

    def __init__(self, name: str, files: Sequence[Path], tensors: Mapping[str, Stored]) -> None:
        self.name = name
        self.files = list(files)
        self.tensors = tensors

    @abstractmethod
    def read(self, name: str) -> Array:
        """A tensor, memory-mapped if possible; bfloat16, which NumPy lacks, as float32.

        Raises `ValueError` if it is damaged.
        """

    def verify_rest(self) -> None:
        """Verify the tensors that were not read, such as buffers, if that is cheap in this format.

        Raises `ValueError` if one is damaged.
        """
        return

    def step(self) -> int | None:
        """The number of training steps, if the checkpoint records it."""
        return None


class Joined(Source):
    """A checkpoint in several files (shards), with each tensor in one of them.

    Raises `ValueError` if two shards hold the same name.
    """

    def __init__(self, name: str, shards: Sequence[Source]) -> None:
        self._shards: dict[str, Source] = {}
        for shard in shards:
            for key in shard.tensors:
                if key in self._shards:
                    raise ValueError(
                        f"{name}: {key[:80]!r} is in {self._shards[key].name} and in {shard.name}; "
                        "keep the shards of one checkpoint"
                    )
                self._shards[key] = shard
        self.layouts = shards[0].layouts
        checksums = {shard.checksum for shard in shards}
        self.checksum = checksums.pop() if len(checksums) == 1 else None
        files = [path for shard in shards for path in shard.files]
        tensors = {key: shard.tensors[key] for key, shard in self._shards.items()}
        super().__init__(name, files, tensors)

    def read(self, name: str) -> Array:
        return self._shards[name].read(name)

    def verify_rest(self) -> None:
        for shard in {id(shard): shard for shard in self._shards.values()}.values():
            shard.verify_rest()


# -- arrays ----------------------------------------------------------------------------------------


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype in which a dtype is stored in files; bfloat16, which NumPy lacks, as bits."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype).newbyteorder("<")


def widened(bits: Array) -> Array:
    """Bfloat16 numbers, given as their bits, as float32; the bits are its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def mapped(path: Path, offset: int, size: int) -> memoryview:
    """Memory-mapped bytes of a file; they take memory only while the result is held.

    Raises `ValueError` if the file has become shorter.
    """
    if size == 0:
        return memoryview(b"")
    skipped = offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        memory = mmap.mmap(
            file.fileno(), size + skipped, access=mmap.ACCESS_READ, offset=offset - skipped
        )
    return memoryview(memory)[skipped:]


def rows_in_order(tensor: Array) -> Iterator[Array]:
    """Successive pieces, some rows each, of a vector or a (transposed) matrix; each is contiguous.

    Each piece is small enough to be in the processor's cache while it is used. It may reuse the
    memory of the previous one, so use a piece before taking the next. (Fresh memory for each would
    cost a quarter of the time.)
    """
    if tensor.ndim < 2:
        tensor = np.ascontiguousarray(tensor)
    if tensor.flags.c_contiguous:
        yield from _pieces(tensor)
        return
    result = np.empty((_ROWS, tensor.shape[1]), tensor.dtype)
    block = np.empty((_COLUMNS, _ROWS + _GAP), tensor.dtype)
    for start in range(0, len(tensor), _ROWS):
        rows = tensor[start : start + _ROWS]
        _gather(rows, result, block)
        yield from _pieces(result[: len(rows)])


def _pieces(tensor: Array) -> Iterator[Array]:
    step = max(1, _PIECE // max(tensor[:1].nbytes, 1))
    for start in range(0, len(tensor), step):
        yield tensor[start : start + step]


def _gather(rows: Array, result: Array, block: Array) -> None:
    """Copy rows whose elements are far apart in memory into `result`, in row order.

    They pass through a small block with a gap after each line. Without it, lines would often be a
    multiple of a large power of two apart, share a few cache sets and evict each other, which
    costs half the speed.
    """
    for start in range(0, rows.shape[1], _COLUMNS):
        across = rows[:, start : start + _COLUMNS].T
        part = block[: across.shape[0], : across.shape[1]]
        part[...] = across
        result[: len(rows), start : start + _COLUMNS] = part.T


def count_non_finite(values: Array) -> int:
    """The number of values that are NaN or infinite."""
    finite = np.isfinite(values)
    return 0 if finite.all() else int(finite.size - np.count_nonzero(finite))


def round_to(dtype: str, exact: Array) -> Array:
    """The nearest values of a dtype; bfloat16, which NumPy lacks, as bits.

    Raises `ValueError` if a finite value becomes infinite.
    """
    if exact.dtype == dtype:
        return exact
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = _bfloat16(exact) if dtype == "bfloat16" else exact.astype(dtype)
    bits = rounded.view(f"u{rounded.itemsize}")
    infinite = bits & ((1 << (8 * rounded.itemsize - 1)) - 1) == _INFINITY[dtype]
    if infinite.any() and np.isfinite(exact[infinite]).any():
        largest = np.abs(exact[np.isfinite(exact)]).max()
        raise ValueError(
            f"values like {largest:.6g}, beyond the largest of {dtype}, {_LARGEST[dtype]:.6g}"
        )
    return rounded


def _bfloat16(exact: Array) -> Array:
    """The upper half of float32's bits, rounded to nearest, ties to even."""
    if exact.dtype == np.float64:
        single = _to_odd_float32(exact)
    else:
        single = exact.astype(np.float32, copy=False)
    bits = single.view(np.uint32)
    nearest = bits >> 16
    nearest &= 1
    nearest += 0x7FFF
    nearest += bits
    nearest >>= 16
    rounded = nearest.astype(np.uint16)
    nan = np.isnan(single)
    if nan.any():  # rounding could turn a NaN into infinity
        rounded[nan] = bits[nan] >> 16 | 0x40
    return rounded


def _to_odd_float32(exact: Array) -> Array:
    """Round float64 to float32 so that rounding again, to 16 bits, equals a single rounding.

    Inexact results get an odd last bit, so a later rounding never sees a false tie (Boldo and
    Melquiond, 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding
    to odd").
    """
    nearest = exact.astype(np.float32)
    bits = nearest.view(np.uint32)
    away = np.abs(nearest.astype(np.float64)) > np.abs(exact)
    inexact = nearest != exact
    odd = (bits - away) | inexact
    return np.where(np.isfinite(exact), odd, bits).astype(np.uint32).view(np.float32)
