"""Make standard input, output and error robust.

In Python, a stream that is closed at the start is None, and the next file that is opened takes its
number; a failed write to standard output can't be told from a failed write to a file; and a
standard error that can't be written ends the program. `standard_streams` mends all three.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class OutputError(OSError):
    """Standard output can't be written; `errno` says why."""


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Make the process's own streams safe to use, for as long as it lasts.

    A closed standard input or output fails with EBADF when it is used. Text written to a closed or
    full standard error is lost. Characters that an encoding lacks are escaped. Streams that a
    caller has replaced are left alone.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    _fill_closed()
    if sys.stdin is sys.__stdin__:
        sys.stdin = _readable(sys.stdin)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _writable(sys.stdout, _Output(1, "w", closefd=False))
    if sys.stderr is sys.__stderr__:
        sys.stderr = _writable(sys.stderr, _Discarding(2, "w", closefd=False), lines=True)
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def discard_output() -> None:
    """Discard the rest of standard output, so that Python's last flush doesn't fail."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: not the process's own stream
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()


def read_input() -> str:
    """All of standard input, without its last line end; raises `ValueError` and `OSError`."""
    return _read(lambda: sys.stdin.read()).removeprefix("\ufeff").rstrip("\r\n")


def read_input_line() -> str:
    """A line of standard input with its end, or "" at the end of it; raises as `read_input`."""
    return _read(lambda: sys.stdin.readline())


def _read(read: Any) -> str:
    try:
        text: str = read()
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start}"
        raise ValueError(f"standard input isn't {error.encoding}: {place}") from None
    except OSError as error:
        raise OSError(error.errno, f"can't read standard input: {error.strerror}") from None
    return text


class _Output(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from None


class _Discarding(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _fill_closed() -> None:
    """Open closed streams.

    Input is opened for writing only and output for reading only, so that they fail as closed ones
    do; standard error is discarded.
    """
    for number, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, mode)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)


def _readable(stream: TextIO | None) -> TextIO:
    if stream is None:
        return open(0, encoding="utf-8", closefd=False)
    encoding = "utf-8" if _is_ascii(stream.encoding) else stream.encoding  # UTF-8 reads ASCII too
    # In the C locale Python would let bytes that aren't text pass, as surrogates. It ends lines at
    # "\n" alone, and old Macs' end at "\r".
    stream.reconfigure(encoding=encoding, errors="strict", newline=None)  # type: ignore[attr-defined]
    return stream


def _writable(stream: TextIO | None, raw: io.FileIO, *, lines: bool = False) -> TextIO:
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        line_buffering=lines or raw.isatty(),
        write_through=bool(getattr(stream, "write_through", False)),
    )


def _is_ascii(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "ascii"
