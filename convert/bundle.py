"""The index of a TensorFlow V2 checkpoint ("tensor bundle"): where in the data files each tensor
stands, and its checksum.

Read and written here, since importing TensorFlow for it takes longer than copying all of GPT2_ML;
the tests hold this module against TensorFlow, both ways. Source: tensorflow/core/protobuf/
tensor_bundle.proto, tensorflow/core/util/tensor_bundle/tensor_bundle.h.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from convert.sources import storage
from convert.table import read_table, write_table
from convert.wire import bytes_field, fields, fixed32_field, number_field

# TensorFlow's numbers for its types; what is not here holds no numbers.
_DTYPES = {
    1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 9: "int64",
    14: "bfloat16", 19: "float16",
}  # fmt: skip
_DTYPE_NUMBERS = {name: number for number, name in _DTYPES.items()}
_MAX_DIMENSIONS = 8
_HEADER = b""  # its key; it sorts before all names
_PRODUCER = 1  # version of the format

# Numbers of the fields in BundleHeaderProto, BundleEntryProto, TensorShapeProto and its Dim.
_NUM_SHARDS, _ENDIANNESS, _VERSION = 1, 2, 3
_DTYPE, _SHAPE, _SHARD, _OFFSET, _SIZE, _CRC32C, _SLICES = 1, 2, 3, 4, 5, 6, 7
_DIM, _DIM_SIZE, _UNKNOWN_RANK = 2, 1, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor: `dtype` is None for strings and the like, `offset` and `size` are bytes of the
    shard's data file, and `crc32c` is masked (`table.mask`)."""

    dtype: str | None
    shape: tuple[int, ...]
    shard: int = 0
    offset: int
    size: int
    crc32c: int


def read_index(data: bytes) -> tuple[int, dict[str, Entry]]:
    """The number of data files, and the tensors by name, sorted.

    Raises `ValueError` for what is damaged or no index.
    """
    table = read_table(data)
    if _HEADER not in table:
        raise ValueError("it has no header")
    header = dict(fields(table.pop(_HEADER)))
    if header.get(_ENDIANNESS, 0) != 0:
        raise ValueError("it was written on a big-endian machine")
    shards = header.get(_NUM_SHARDS, 0)
    if not isinstance(shards, int) or not 1 <= shards < 10**5:
        raise ValueError(f"it counts {shards!r} data files")
    entries = {}
    for key, value in sorted(table.items()):
        name = key.decode("utf-8", errors="backslashreplace")
        try:
            entries[name] = _parse_entry(value, shards)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name[:200]!r}: {error}") from None
    return shards, entries


def write_index(entries: Mapping[str, Entry]) -> bytes:
    """The index of tensors in one data file."""
    header = number_field(_NUM_SHARDS, 1) + bytes_field(_VERSION, number_field(1, _PRODUCER))
    pairs = [(name.encode(), _format_entry(entry)) for name, entry in entries.items()]
    return write_table([(_HEADER, header), *sorted(pairs)])


def _parse_entry(message: bytes, shards: int) -> Entry:
    values: dict[int, Any] = {_DTYPE: 0, _SHAPE: b"", _SHARD: 0, _OFFSET: 0, _SIZE: 0, _CRC32C: 0}
    values.update(fields(message))
    if _SLICES in values:
        raise ValueError(
            "a partitioned variable, stored in slices; restore it in TensorFlow and save it whole"
        )
    if not all(isinstance(value, bytes) == (number == _SHAPE) for number, value in values.items()):
        raise ValueError("not described as a tensor is")
    entry = Entry(
        dtype=_DTYPES.get(values[_DTYPE]),
        shape=_parse_shape(values[_SHAPE]),
        shard=values[_SHARD],
        offset=values[_OFFSET],
        size=values[_SIZE],
        crc32c=values[_CRC32C],
    )
    if entry.shard >= shards:
        raise ValueError(f"in data file {entry.shard} of {shards}")
    if entry.dtype is not None:
        expected = math.prod(entry.shape) * storage(entry.dtype).itemsize
        if entry.size != expected:
            raise ValueError(f"{entry.size} bytes; {entry.dtype} {entry.shape} takes {expected}")
    return entry


def _parse_shape(message: bytes) -> tuple[int, ...]:
    sizes = []
    for number, value in fields(message):
        if number == _DIM and isinstance(value, bytes):
            sizes.append(dict(fields(value)).get(_DIM_SIZE, 0))
        elif number == _UNKNOWN_RANK and value:
            raise ValueError("a shape that is not known")
    if len(sizes) > _MAX_DIMENSIONS or not all(
        isinstance(size, int) and size < 2**63 for size in sizes
    ):
        raise ValueError("an impossible shape")
    return tuple(map(int, sizes))


def _format_entry(entry: Entry) -> bytes:
    assert entry.dtype is not None
    dims = b"".join(bytes_field(_DIM, number_field(_DIM_SIZE, size)) for size in entry.shape)
    return b"".join(
        (
            number_field(_DTYPE, _DTYPE_NUMBERS[entry.dtype]),
            bytes_field(_SHAPE, dims),
            number_field(_OFFSET, entry.offset),
            number_field(_SIZE, entry.size),
            fixed32_field(_CRC32C, entry.crc32c),
        )
    )
