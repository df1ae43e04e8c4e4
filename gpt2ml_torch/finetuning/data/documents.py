"""Documents out of text and JSON Lines, a piece at a time, with errors that name file and line.

A document is given in pieces so that one of any length fits in memory: pieces end where the
tokenizer separates words anyway, so the tokens of the pieces are those of the whole.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Literal, NamedTuple

from gpt2ml_torch.finetuning.data.compressed import DamagedFile, open_source
from gpt2ml_torch.finetuning.data.files import Source, shown

Separator = Literal["blank-line", "file", "line"]
SEPARATORS: tuple[Separator, ...] = ("blank-line", "file", "line")

PIECE_CHARACTERS = 1 << 18
MAX_LINE_BYTES = 1 << 26  # 64 MiB; what has no line break for so long is not text

# After these the tokenizer begins a new word, whatever follows.
_WORD_END = re.compile("[ \t\n\r\u3000\u4e00-\u9fff]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_MAGIC = {
    b"\x1f\x8b": "gzip: name it .gz",
    b"\x28\xb5\x2f\xfd": "zstd: name it .zst",
    b"\xfd7zXZ\x00": "xz: name it .xz",
    b"PK\x03\x04": "a zip archive (or .docx, .xlsx): unpack or export it as text",
    b"%PDF": "a PDF: export it as text",
    b"\xff\xfe": "UTF-16: iconv -f UTF-16 -t UTF-8 OLD > NEW",
    b"\xfe\xff": "UTF-16: iconv -f UTF-16 -t UTF-8 OLD > NEW",
}


class Piece(NamedTuple):
    """A part of a document, in order."""

    text: str
    learned: bool = True  # False for a prompt, which is read but not learned
    ends: bool = True  # whether the document ends here


def read_pieces(
    source: Source,
    *,
    separator: Separator = "blank-line",
    progress: Callable[[int], None] | None = None,
) -> Iterator[Piece]:
    """Read the documents of one file.

    Text is cut into documents at blank lines, at every line, or not at all (`separator`); each line
    of JSON Lines is one document. `progress` is called now and then with the number of bytes of the
    file that were read since. A file without any text gives nothing.

    Raises `OSError` for a file that cannot be read, and `ValueError`, with file and line, for bytes
    that are not UTF-8, damaged compression, bad JSON, and JSON without the fields that are
    expected.
    """
    if separator not in SEPARATORS:
        raise ValueError(f"separator is {separator!r}; expected one of {', '.join(SEPARATORS)}")
    with open_source(source) as (plain, file):
        lines = _lines(source, plain)
        if progress is not None:
            lines = _reporting(lines, file, progress)
        if source.kind == "jsonl":
            yield from _json_pieces(source, lines)
        else:
            yield from _text_pieces(lines, separator)


def _complain(source: Source, line: int, problem: str) -> ValueError:
    return ValueError(f"{shown(source.path)}, line {line}: {problem}")


# -- bytes to lines -------------------------------------------------------------------------------


def _lines(source: Source, plain: BinaryIO) -> Iterator[tuple[int, str]]:
    """Number and text of each line; only "\\n" ends one, as in every editor's line count."""
    for number in itertools.count(1):
        try:
            data = plain.readline(MAX_LINE_BYTES + 1)
        except DamagedFile as error:
            raise ValueError(f"{error} (line {number})") from None
        except OSError as error:
            raise type(error)(f"cannot read {shown(source.path)}: {error.strerror}") from None
        if not data:
            return
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if b"\0" in data:
            raise _complain(
                source, number, f"found a NUL byte{_guess(data, number)}; expected text"
            )
        if len(data) > MAX_LINE_BYTES:
            raise _complain(
                source, number, f"the line is longer than {MAX_LINE_BYTES:,} bytes; break it up"
            )
        try:
            yield number, data.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"byte 0x{data[error.start]:02x} is not UTF-8{_guess(data, number)}"
            raise _complain(source, number, f"{found}; expected UTF-8") from None


def _guess(data: bytes, line: int) -> str:
    """What the file may be instead, in brackets, or nothing."""
    if line == 1:
        for magic, what in _MAGIC.items():
            if data.startswith(magic):
                return f" (perhaps {what})"
    if b"\0" in data:
        return " (perhaps UTF-16, or no text at all)"
    try:
        data.rstrip(b"\n").decode("gb18030")
    except UnicodeDecodeError:
        return ""
    return " (perhaps GB18030: iconv -f GB18030 -t UTF-8 OLD > NEW)"


def _reporting(
    lines: Iterable[tuple[int, str]], file: BinaryIO, progress: Callable[[int], None]
) -> Iterator[tuple[int, str]]:
    before = 0
    for number, text in lines:
        if number % 256 == 0:
            now = file.tell()
            progress(now - before)
            before = now
        yield number, text
    progress(file.tell() - before)


# -- lines to documents ---------------------------------------------------------------------------


def _text_pieces(lines: Iterable[tuple[int, str]], separator: Separator) -> Iterator[Piece]:
    held: list[str] = []  # never empty inside a document, so that its last piece can be told
    size = 0
    for _, line in lines:
        if line.isspace() or not line:
            if separator == "blank-line" and held:
                yield from _portions("".join(held))
                held, size = [], 0
            continue
        if separator == "line":
            yield from _portions(line)
            continue
        if size >= PIECE_CHARACTERS:
            yield from _portions("".join(held), ends=False)
            held, size = [], 0
        held.append(line)
        size += len(line)
    if held:
        yield from _portions("".join(held))


def _portions(text: str, *, learned: bool = True, ends: bool = True) -> Iterator[Piece]:
    """Cut a long text where a word ends, if it has such a place."""
    start = 0
    while len(text) - start > 2 * PIECE_CHARACTERS:
        cut = _WORD_END.search(text, start + PIECE_CHARACTERS)
        if cut is None or cut.end() == len(text):
            break
        yield Piece(text[start : cut.end()], learned, False)
        start = cut.end()
    yield Piece(text[start:] if start else text, learned, ends)


def _json_pieces(source: Source, lines: Iterable[tuple[int, str]]) -> Iterator[Piece]:
    for number, line in lines:
        if line.isspace():
            continue
        try:
            prompt, learned = _fields(_parse(line))
        except ValueError as error:
            raise _complain(source, number, str(error)) from None
        if prompt:
            yield from _portions(prompt, learned=False, ends=False)
        yield from _portions(learned)


def _parse(line: str) -> dict[str, object]:
    expected = (
        'expected an object such as {"text": "..."} or {"prompt": "...", "completion": "..."}'
    )
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        whole = " (a whole JSON array? make it lines: jq -c '.[]' OLD > NEW)"
        hint = whole if line.lstrip().startswith("[") else ""
        where = f"{error.msg} at column {error.colno}"
        raise ValueError(f"not JSON: {where}{hint}; {expected} on one line") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets nested as deep
        raise ValueError(f"not JSON that can be read; {expected} on one line") from None
    if not isinstance(value, dict):
        raise ValueError(f"found {_kind(value)}; {expected}")
    return value


def _fields(value: dict[str, object]) -> tuple[str, str]:
    """The prompt, possibly empty, and what is learned after it."""
    if "text" in value:
        extra = [name for name in ("prompt", "completion") if name in value]
        if extra:
            raise ValueError(f"found both text and {extra[0]}; give text, or prompt and completion")
        return "", _string(value, "text")
    for name, other in (("prompt", "completion"), ("completion", "prompt")):
        if other in value and name not in value:
            raise ValueError(f"found {other} but no {name}; expected both")
    if "prompt" not in value:
        names = ", ".join(map(repr, itertools.islice(value, 5))) or "none"
        raise ValueError(f"no field text, nor prompt and completion; found {names}")
    return _string(value, "prompt", may_be_empty=True), _string(value, "completion")


def _string(value: dict[str, object], name: str, *, may_be_empty: bool = False) -> str:
    text = value[name]
    if not isinstance(text, str):
        raise ValueError(f"{name} is {_kind(text)}; expected a string")
    if not text.strip() and not may_be_empty:
        raise ValueError(f"{name} is empty; write something to learn, or delete the line")
    if _LONE_SURROGATE.search(text):
        raise ValueError(f"{name} holds half a surrogate pair (\\ud800 to \\udfff); write it whole")
    return text


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    for kind, name in ((dict, "an object"), (list, "an array"), (str, "a string")):
        if isinstance(value, kind):
            return name
    return "a number"
