"""CRC-32C, the checksum of every tensor in a model file.

The package `crc32c` uses the processor's instruction for it. Without the package, a table in Python
gives the same result a thousand times more slowly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from gpt2ml_torch.modelfile.format import METADATA_CHECKSUM
from gpt2ml_torch.valid_json import to_json

_fast: Callable[..., int] | None
try:
    from crc32c import crc32c as _fast
except ImportError:
    _fast = None

_POLYNOMIAL = 0x82F63B78  # reversed


def crc32c(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """The CRC-32C of some bytes; `start` is the checksum of the preceding bytes."""
    if _fast is not None:
        return _fast(data, start)
    return table_crc32c(data, start)


def table_crc32c(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """`crc32c` in plain Python."""
    table, crc = _table(), start ^ 0xFFFFFFFF
    for byte in memoryview(data).cast("B"):
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@functools.cache
def _table() -> tuple[int, ...]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


def metadata_checksum(metadata: Mapping[str, str]) -> str:
    """The checksum of all metadata except itself: 8 hexadecimal digits."""
    rest = {key: value for key, value in metadata.items() if key != METADATA_CHECKSUM}
    return f"{crc32c(to_json(rest, sort_keys=True).encode()):08x}"
