"""Open files as plain bytes, whatever their compression.

A truncated file is always an error, and a small file can't unpack to terabytes.
"""

from __future__ import annotations

import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from gpt2ml_torch.finetuning.data.files import Source, shown

_READ_BYTES = 1 << 18
# Text shrinks to a third or a tenth, logs and tables to a fiftieth. A file that shrank further may
# be a small one that is made to keep a machine busy for hours.
_MAX_RATIO = 200
_ZSTD_BYTES = 1 << 11  # unpacked at once, to at most 64 MiB: 4 bytes can become 128 KiB
_ZSTD_WINDOW_LOG = 31  # what `zstd --long=31` writes; both libraries refuse more than 27 by default
_FREE_BYTES = 1 << 26  # 64 MiB are unpacked at any ratio


class DamagedFile(ValueError):
    """A compressed file that ends early, is not what its name says, or unpacks without end."""


@contextmanager
def open_source(source: Source) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file; yields its plain bytes and the file itself, whose `tell` measures progress.

    Raises `OSError` if it can't be opened; reading raises `DamagedFile`.
    """
    try:
        file = open(source.path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise type(error)(f"cannot read {shown(source.path)}: {error.strerror}") from None
    with file:
        if source.compression is None:
            yield file, file
            return
        raw = _Decompressed(source, file)
        with io.BufferedReader(cast(io.RawIOBase, raw), _READ_BYTES) as plain:
            yield plain, file


class _Decompressed(io.RawIOBase):
    """Plain bytes of a gzip, xz or zstd file, with its library's errors turned into ours."""

    def __init__(self, source: Source, file: BinaryIO) -> None:
        super().__init__()
        self._source, self._file, self._given = source, file, 0
        self._stream, self._errors = _decompressor(source, file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        name, kind = shown(self._source.path), self._source.compression
        try:
            data = self._stream.read(len(buffer))
        except EOFError:
            raise DamagedFile(f"{name} ends before its {kind} data does; fetch it again") from None
        except self._errors as error:
            raise DamagedFile(
                f"{name} is damaged, or not {kind}: {str(error).splitlines()[0]}; "
                "fetch it again, or rename it"
            ) from None
        buffer[: len(data)] = data
        self._given += len(data)
        if self._given > max(_FREE_BYTES, _MAX_RATIO * self._file.tell()):
            raise DamagedFile(
                f"{name} unpacks to more than {_MAX_RATIO} times its size, which text does not; "
                "if it is meant, unpack it to a plain file first"
            )
        return len(data)


def _decompressor(source: Source, file: BinaryIO) -> tuple[Any, tuple[type[Exception], ...]]:
    if source.compression == "gzip":
        return gzip.GzipFile(fileobj=file), (gzip.BadGzipFile, zlib.error)
    if source.compression == "xz":
        return lzma.LZMAFile(file), (lzma.LZMAError,)
    if sys.version_info >= (3, 14):
        from compression import zstd

        options = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
        return zstd.ZstdFile(file, options=options), (zstd.ZstdError,)
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{shown(source.path)} is zstd, which needs the package zstandard: "
            "pip install zstandard, or unpack the file with `unzstd`"
        ) from None
    return _Zstandard(file), (zstandard.ZstdError,)


class _Zstandard:
    """`read` over the frames of a zstd file.

    The package's own reader accepts a truncated file as complete.
    """

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._library = zstandard.ZstdDecompressor(max_window_size=1 << _ZSTD_WINDOW_LOG)
        self._file = file
        self._frame: Any = None
        self._plain = memoryview(b"")

    def read(self, size: int) -> bytes:
        while not self._plain:
            data = self._rest() or self._file.read(_ZSTD_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError
                return b""
            if self._frame is None:
                self._frame = self._library.decompressobj()
            self._plain = memoryview(self._frame.decompress(data))
        taken, self._plain = self._plain[:size], self._plain[size:]
        return bytes(taken)

    def _rest(self) -> bytes:
        """Bytes already read that belong to the next frame, if this one has ended."""
        if self._frame is None or not self._frame.eof:
            return b""
        rest = self._frame.unused_data
        self._frame = None
        return rest
