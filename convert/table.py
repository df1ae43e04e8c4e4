"""The sorted string table that a TensorFlow checkpoint's index file is, read and written.

Its blocks may be compressed with Snappy, and each carries a checksum. Source: tensorflow,
tsl/lib/io/format.cc and table_format.txt; google/snappy, format_description.txt.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from crc32c import crc32c

from convert.wire import Cursor, varint

_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_FOOTER_BYTES = 48
_PLAIN, _SNAPPY = b"\0", b"\1"
_MAX_BLOCK = 64 << 20  # bytes, uncompressed; TensorFlow's have 256 KiB
_MAX_TABLE = 64 << 20  # bytes of all entries; the published ones' have 0.1 MB


def masked_crc32c(*pieces: bytes | memoryview) -> int:
    """The checksum that TensorFlow stores: of data that holds checksums itself, a plain one would
    say little."""
    crc = 0
    for piece in pieces:
        crc = crc32c(piece, crc)
    return mask(crc)


def mask(crc: int) -> int:
    """What is stored of a plain CRC-32C."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_table(data: bytes) -> dict[bytes, bytes]:
    """All entries, in order; raises `ValueError` for what is damaged or no such table."""
    if len(data) < _FOOTER_BYTES or not data.endswith(_MAGIC):
        raise ValueError("it does not end as one should")
    footer = Cursor(data[-_FOOTER_BYTES:])
    _handle(footer)  # of the filters, which checkpoints don't have
    entries: dict[bytes, bytes] = {}
    end = total = 0
    for _, handle in _pairs(_block(data, *_handle(footer))):
        start, size = _handle(Cursor(handle))
        if start < end:  # else a small file could name one large block many times
            raise ValueError("its blocks overlap")
        end = start + size
        for key, value in _pairs(_block(data, start, size)):
            total += len(key) + len(value) + 64  # what an entry of nothing takes in memory
            if total > _MAX_TABLE:  # a few bytes can stand for a long key
                raise ValueError("it holds more than any checkpoint's index")
            entries[key] = value
    return entries


def write_table(entries: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A table of these entries, which must be sorted, in one block as it is."""
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
    """Where a block stands: offset and size."""
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
        raise ValueError(f"a block is compressed in the unknown way {kind[0]}")
    return block if kind == _PLAIN else _uncompress(block)


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """A block's entries: each key begins as the one before it does, for so many bytes."""
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


def _uncompress(block: bytes) -> bytes:
    """Undo Snappy: literal bytes, and copies of what came before."""
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
        piece = out[start : start + count]  # less than `count` where it copies what it writes
        out += (piece * -(-count // len(piece)))[:count]
        if len(out) > length:
            break
    if len(out) != length:
        raise ValueError(f"a block should hold {length} bytes")
    return bytes(out)
