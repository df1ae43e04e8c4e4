"""The index of a TensorFlow V2 checkpoint ("tensor bundle"): each tensor's place and checksum.

From the bottom up: protocol buffers, the sorted string table that holds them (its blocks may be
compressed with Snappy, and each carries a checksum), and the entries. This module reads and writes
them itself, because importing TensorFlow takes longer than copying all of GPT2_ML. Tests compare it
with TensorFlow in both directions. No size or offset in a file is trusted: one that reaches beyond
the end raises `ValueError`.

Source: tensorflow/core/protobuf/tensor_bundle.proto, tensorflow/core/util/tensor_bundle/
tensor_bundle.h; tsl/lib/io/format.cc and table_format.txt; google/snappy, format_description.txt.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from convert.source import storage_dtype
from gpt2ml_torch.modelfile.checksum import crc32c

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protocol buffers' wire types

_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_FOOTER_BYTES = 48
_PLAIN, _SNAPPY = b"\0", b"\1"
_MAX_BLOCK = 64 << 20  # bytes, uncompressed; TensorFlow writes 256 KiB
_MAX_TABLE = 64 << 20  # bytes of all entries; the published checkpoints have 0.1 MB

# TensorFlow's numbers of its numeric types.
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


class Cursor:
    """A position in a byte string that advances as the bytes are read."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether anything is left."""
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """The next `count` bytes; raises `ValueError` if there are fewer."""
        end = self._at + count
        if end > len(self._data):
            raise ValueError(f"ends {end - len(self._data)} bytes early")
        self._at, start = end, self._at
        return self._data[start:end]

    def varint(self) -> int:
        """An unsigned number of up to 64 bits, seven of them in each byte."""
        value = 0
        for shift in range(0, 70, 7):
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (2**64 - 1)
        raise ValueError("holds an endless number")


def varint(value: int) -> bytes:
    """The inverse of `Cursor.varint`."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """A protocol buffer's fields in order: the number, and the value or bytes."""
    cursor = Cursor(message)
    while cursor:
        number, kind = divmod(cursor.varint(), 8)
        if kind == _VARINT:
            yield number, cursor.varint()
        elif kind == _BYTES:
            yield number, cursor.take(cursor.varint())
        elif kind == _FIXED32:
            yield number, struct.unpack("<I", cursor.take(4))[0]
        elif kind == _FIXED64:
            yield number, struct.unpack("<Q", cursor.take(8))[0]
        else:
            raise ValueError(f"holds a field of the unknown kind {kind}")


def number_field(number: int, value: int) -> bytes:
    """A field that holds a number."""
    return varint(number * 8 + _VARINT) + varint(value)


def bytes_field(number: int, value: bytes) -> bytes:
    """A field that holds bytes or another message."""
    return varint(number * 8 + _BYTES) + varint(len(value)) + value


def fixed32_field(number: int, value: int) -> bytes:
    """A field that holds four bytes."""
    return varint(number * 8 + _FIXED32) + struct.pack("<I", value)


def masked_crc32c(*pieces: bytes | memoryview) -> int:
    """The masked CRC-32C of all pieces together, as TensorFlow stores it.

    It is masked because the CRC of data that itself contains CRCs is weak.
    """
    crc = 0
    for piece in pieces:
        crc = crc32c(piece, crc)
    return mask(crc)


def mask(crc: int) -> int:
    """The stored form of a plain CRC-32C."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_table(data: bytes) -> dict[bytes, bytes]:
    """All entries, in order; raises `ValueError` if the data are damaged or not such a table."""
    if len(data) < _FOOTER_BYTES or not data.endswith(_MAGIC):
        raise ValueError("it does not end with the footer of a table")
    footer = Cursor(data[-_FOOTER_BYTES:])
    _handle(footer)  # the filters' block, which is empty in checkpoints
    entries: dict[bytes, bytes] = {}
    end = total = 0
    for _, handle in _pairs(_block(data, *_handle(footer))):
        start, size = _handle(Cursor(handle))
        if start < end:  # otherwise a small file could refer to one large block many times
            raise ValueError("its blocks overlap")
        end = start + size
        for key, value in _pairs(_block(data, start, size)):
            total += len(key) + len(value) + 64  # 64: the memory of an empty entry
            if total > _MAX_TABLE:  # keys share prefixes, so a few bytes can make a long key
                raise ValueError("it holds more than any checkpoint's index")
            entries[key] = value
    return entries


def write_table(entries: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A table of these entries, which must be sorted, in one uncompressed block."""
    pairs = list(entries)
    content = bytearray()

    def append(block: bytes) -> bytes:
        """Append a block with its trailer; returns the handle that points to it."""
        handle = varint(len(content)) + varint(len(block))
        content.extend(block + _PLAIN + struct.pack("<I", masked_crc32c(block, _PLAIN)))
        return handle

    data = append(_join(pairs))
    filters = append(_join([]))
    index = append(_join([(pairs[-1][0], data)]))
    return bytes(content) + (filters + index).ljust(_FOOTER_BYTES - 8, b"\0") + _MAGIC


def _handle(cursor: Cursor) -> tuple[int, int]:
    """A block's offset and size."""
    return cursor.varint(), cursor.varint()


def _block(data: bytes, start: int, size: int) -> bytes:
    """A block's content, checked and uncompressed."""
    trailer = data[start + size : start + size + 5]
    if len(trailer) < 5:
        raise ValueError("a block reaches beyond its end")
    block, kind = data[start : start + size], trailer[:1]
    if masked_crc32c(block, kind) != struct.unpack("<I", trailer[1:])[0]:
        raise ValueError("a block's checksum is wrong")
    if kind not in (_PLAIN, _SNAPPY):
        raise ValueError(f"a block has the unknown compression type {kind[0]}")
    return block if kind == _PLAIN else uncompress(block)


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """A block's entries; each key shares a number of bytes with the start of the key before it."""
    if len(block) < 4:
        raise ValueError("a block is too short")
    restarts = 4 * (1 + struct.unpack("<I", block[-4:])[0])
    if restarts > len(block):
        raise ValueError("a block is too short")
    cursor, key = Cursor(block[:-restarts]), b""
    while cursor:
        shared, own, size = cursor.varint(), cursor.varint(), cursor.varint()
        key = key[:shared] + cursor.take(own)
        yield key, cursor.take(size)


def _join(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A block in which every entry is a restart point, so that no key is abbreviated."""
    content, restarts = bytearray(), []
    for key, value in pairs:
        restarts.append(len(content))
        content += varint(0) + varint(len(key)) + varint(len(value)) + key + value
    restarts = restarts or [0]
    return bytes(content) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def uncompress(block: bytes) -> bytes:
    """Decompress a Snappy block: literal bytes, and copies of earlier output."""
    cursor, out = Cursor(block), bytearray()
    length = cursor.varint()
    if length > _MAX_BLOCK:
        raise ValueError(f"a block of {length} bytes is too large")
    while cursor:
        tag = cursor.take(1)[0]
        high, kind = tag >> 2, tag & 3
        if kind == 0:  # literal; a long one's length follows in 1 to 4 bytes
            count = high if high < 60 else int.from_bytes(cursor.take(high - 59), "little")
            out += cursor.take(count + 1)
            continue
        if kind == 1:
            count = (high & 7) + 4
            offset = (high >> 3) << 8 | cursor.take(1)[0]
        else:
            count = high + 1
            offset = int.from_bytes(cursor.take(2 if kind == 2 else 4), "little")
        if not 0 < offset <= len(out):
            raise ValueError("a block copies what is not there")
        start = len(out) - offset
        piece = out[start : start + count]  # shorter than `count` if the copy overlaps itself
        out += (piece * -(-count // len(piece)))[:count]
        if len(out) > length:
            break
    if len(out) != length:
        raise ValueError(f"a block should hold {length} bytes")
    return bytes(out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor in a data file."""

    dtype: str | None  # None for strings and other types that are not numeric
    shape: tuple[int, ...]
    shard: int = 0  # index of the data file
    offset: int  # bytes
    size: int  # bytes
    crc32c: int  # masked (`mask`)


def read_index(data: bytes) -> tuple[int, dict[str, Entry]]:
    """The number of data files, and the tensors sorted by name.

    Raises `ValueError` if the data are damaged or not an index.
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
        raise ValueError("it is not described as a tensor")
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
        expected = math.prod(entry.shape) * storage_dtype(entry.dtype).itemsize
        if entry.size != expected:
            raise ValueError(f"{entry.size} bytes; {entry.dtype} {entry.shape} takes {expected}")
    return entry


def _parse_shape(message: bytes) -> tuple[int, ...]:
    sizes = []
    for number, value in fields(message):
        if number == _DIM and isinstance(value, bytes):
            sizes.append(dict(fields(value)).get(_DIM_SIZE, 0))
        elif number == _UNKNOWN_RANK and value:
            raise ValueError("its shape is unknown")
    if len(sizes) > _MAX_DIMENSIONS or not all(
        isinstance(size, int) and size < 2**63 for size in sizes
    ):
        raise ValueError("its shape is impossible")
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
