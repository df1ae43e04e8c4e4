"""Bytes from a stranger, taken one after the other: varints and protocol buffers, as TensorFlow's
index files hold them.

Nothing is believed: what reaches beyond the end is a `ValueError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protocol buffers' wire types


class Cursor:
    """A place in a byte string that moves as it is read."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether anything is left."""
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """The next bytes."""
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
    """A protocol buffer's fields as they come: number, and value or bytes."""
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
