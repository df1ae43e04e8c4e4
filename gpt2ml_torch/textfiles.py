"""Small text files that a user names, read in bounded time and memory."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def read_text_file(
    path: str | os.PathLike[str], *, max_bytes: int, expected: str, pipes: bool = False
) -> str:
    """Return the text of a UTF-8 file; line ends and a byte order mark stay as they are.

    `expected` describes the file in errors, such as "a vocabulary, one token a line". `pipes`
    allows a pipe too; a pipe without a writer is empty.

    Raises `OSError` if the path is not a regular file (a device may have no end) or can't be read,
    and `ValueError` if it holds more than `max_bytes` or bytes that are not UTF-8.
    """
    path = Path(path)
    # Without O_NONBLOCK, opening a pipe waits for a writer, who may never come.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):  # `open`'s error names only the descriptor
        os.close(descriptor)
        raise IsADirectoryError(f"{path} is a folder; expected a file: {expected}")
    with open(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if pipes and stat.S_ISFIFO(mode):
            os.set_blocking(descriptor, True)
        elif not stat.S_ISREG(mode):
            raise OSError(f"{path} is not a regular file; expected {expected}")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(
            f"{path} has more than {max_bytes:,} bytes, the limit for it; expected {expected}"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} in line {line};"
            f" expected {expected}, in UTF-8"
        ) from None
