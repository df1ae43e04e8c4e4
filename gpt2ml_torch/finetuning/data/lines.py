"""Plain bytes to numbered lines of text, with errors that name file and line.

Lines end at LF, CR LF or a lone CR. Files are decoded block by block, not line by line, so that
long runs of blank lines cost little and a whole file may be one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

from gpt2ml_torch.finetuning.data.charsets import describe_undecodable
from gpt2ml_torch.finetuning.data.compressed import DamagedFile
from gpt2ml_torch.finetuning.data.files import Source, shown

BLOCK_BYTES = 1 << 18
MAX_LINE_CHARACTERS = 1 << 26  # 67 million; data without a line break for so long is not text

_LINE = re.compile("\n+|[^\n]+\n?")
_MARKS_AT_LINE_START = re.compile("(?<=\n)\ufeff+")


class Numbered(NamedTuple):
    """Text, and the number of the line that it begins in."""

    line: int
    text: str


def complaint(source: Source, line: int, problem: str) -> ValueError:
    """The error for one line of a file."""
    return ValueError(f"{shown(source.path)}, line {line}: {problem}")


def read_blocks(
    source: Source, plain: BinaryIO, *, progress: Callable[[], None] = lambda: None
) -> Iterator[Numbered]:
    """Yield the text a block at a time; a block ends anywhere and is not empty.

    Line ends become LF. Byte order marks at the start of a line, where joining files leaves them,
    are dropped. `progress` is called after each block.

    Raises `OSError` for a file that cannot be read, and `ValueError`, with file and line, for NUL
    bytes, bytes that are not UTF-8, and damaged compression.
    """
    line, held, at_line_start, first, seen_utf8 = 1, b"", True, True, False
    while True:
        block = _read(source, plain, line)
        data = held + block
        text, held, bad = _decode(data, last=not block)
        if "\ufeff" in text:
            text = _MARKS_AT_LINE_START.sub("", text.lstrip("\ufeff") if at_line_start else text)
        if text:
            yield Numbered(line, text)
            line += text.count("\n")
            at_line_start = text.endswith("\n")
            seen_utf8 = seen_utf8 or not text.isascii()
        if bad is not None:
            found = describe_undecodable(data, bad, first=first, seen_utf8=seen_utf8)
            raise complaint(source, line, found)
        if not block:
            return
        first = False
        progress()


def _read(source: Source, plain: BinaryIO, line: int) -> bytes:
    try:
        # One read of the underlying file, so that data before a damaged part are used first.
        return plain.read1(BLOCK_BYTES)  # type: ignore[attr-defined]
    except DamagedFile as error:
        raise ValueError(f"{error} (line {line})") from None
    except OSError as error:
        raise type(error)(f"cannot read {shown(source.path)}: {error.strerror}") from None


def _decode(data: bytes, *, last: bool) -> tuple[str, bytes, int | None]:
    """The text of `data`, the bytes to keep for the next block, and the index of a bad byte."""
    nul = data.find(b"\0")
    stop, bad = (len(data), None) if nul < 0 else (nul, nul)
    try:
        text = data[:stop].decode("utf-8")
    except UnicodeDecodeError as error:
        stop = error.start
        text = data[:stop].decode("utf-8")
        cut_off = bad is None and not last and error.reason == "unexpected end of data"
        bad = None if cut_off else error.start
    held = data[stop:] if bad is None else b""
    if "\r" in text:
        if not held and not last and bad is None and text.endswith("\r"):
            returns = 2 if text.endswith("\r\r") else 1  # perhaps the start of CR CR LF
            text, held = text[:-returns], b"\r" * returns
        # Careless conversions write CR CR LF.
        for end in ("\r\r\n", "\r\n", "\r"):
            text = text.replace(end, "\n")
    return text, held, bad


def read_lines(source: Source, blocks: Iterable[Numbered]) -> Iterator[Numbered]:
    """Yield the lines with their ends; a run of blank lines may come as one, the first.

    Raises `ValueError` for a line longer than `MAX_LINE_CHARACTERS`.
    """
    held: list[str] = []  # the parts of a line whose end has not come yet
    size = number = 0
    for number, text in blocks:
        if held:
            end = text.find("\n") + 1 or len(text)
            held.append(text[:end])
            size += end
            if size > MAX_LINE_CHARACTERS:
                limit = f"{MAX_LINE_CHARACTERS:,} characters"
                raise complaint(source, number, f"the line is longer than {limit}; break it up")
            if text[end - 1] != "\n":
                continue
            yield Numbered(number, "".join(held))
            held, text, number = [], text[end:], number + 1
        if text.isspace() and (end := text.rfind("\n") + 1):
            yield Numbered(number, "\n")
            number += text.count("\n")
            text = text[end:]
        for part in _LINE.findall(text):
            if part[-1] == "\n":
                yield Numbered(number, part)
                number += part.count("\n")
            else:
                held, size = [part], len(part)
    if held:
        yield Numbered(number, "".join(held))
