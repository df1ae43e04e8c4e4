"""JSON values of a file, one at a time: JSON Lines, one array, or values over several lines.

A file may be larger than the memory; a single value may have `MAX_LINE_CHARACTERS` characters.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from gpt2ml_torch.finetuning.data import lines
from gpt2ml_torch.finetuning.data.files import Source
from gpt2ml_torch.finetuning.data.lines import Numbered, complaint, read_lines

_SPACE = re.compile("[ \t\n]*")
_PEEKED = 1 << 14  # characters
_LONGEST_ESCAPE = len("\\ud83d\\ude00") + 1
_decoder = json.JSONDecoder()


class Value(NamedTuple):
    """A parsed value, and the line that it begins in."""

    line: int
    value: object


def read_values(source: Source, blocks: Iterator[Numbered]) -> Iterator[Value]:
    """Yield the values: the elements of the file's only array, or one value for each line.

    If the first line only begins an object, the file is read as consecutive objects over several
    lines.

    Raises `ValueError`, with file and line, for text that is not JSON.
    """
    first = next((block for block in blocks if not block.text.isspace()), None)
    if first is None:
        return
    rest = itertools.chain([first], blocks)
    text = first.text.lstrip()
    line, _, more = text.partition("\n")
    if line.startswith("["):
        yield from _Reader(source, rest).array()
    elif more and line.startswith("{") and _goes_on(line):
        yield from _Reader(source, rest).values()
    else:
        yield from _values_of_lines(source, read_lines(source, rest))


def begins_as_json(text: str) -> bool:
    """Whether a text begins with a JSON object, or with an array's first string or object."""
    text = text.lstrip()
    is_array = text.startswith("[")
    start = _end_of_space(text, 1) if is_array else 0
    if text[start : start + 1] not in (("{", '"') if is_array else ("{",)):
        return False
    try:
        value, end = _decoder.raw_decode(text, start)
    except (ValueError, RecursionError):
        return False
    after = text[_end_of_space(text, end) :][:1]
    return value != {} and (after in ("", ",", "]") if is_array else after in ("", "{", "["))


def begins_as_strings(text: str) -> bool:
    """Whether each of a text's first lines is a JSON string."""
    lines = [line for line in text[:_PEEKED].split("\n")[:-1] if not line.isspace()][:3]
    try:
        return len(lines) > 1 and all(isinstance(json.loads(line), str) for line in lines)
    except (ValueError, RecursionError):
        return False


def _end_of_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _goes_on(line: str) -> bool:
    """Whether a line is only the beginning of a JSON object."""
    try:
        _decoder.raw_decode(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line) and line.rstrip()[-1] in "{[,"
    except (ValueError, RecursionError):
        pass
    return False


def _values_of_lines(source: Source, numbered: Iterator[Numbered]) -> Iterator[Value]:
    for number, line in numbered:
        if line.isspace():
            continue
        try:
            yield Value(number, json.loads(line))
        except json.JSONDecodeError as error:
            raise complaint(source, number, _not_json(error.msg, error.colno)) from None
        except (ValueError, RecursionError):
            raise complaint(source, number, _NOT_READABLE) from None


_NOT_READABLE = "not JSON that can be read (numbers too long, or nested too deeply)"

_CUT_OFF = "the file ends inside a value or its array; fetch it again"


def _not_json(message: str, column: int) -> str:
    return f"not JSON: {message} at column {column}; expected one value on each line, or one array"


class _Reader:
    """Parses values from blocks of text, and reads more if a value reaches beyond the text."""

    def __init__(self, source: Source, blocks: Iterator[Numbered]) -> None:
        self._source, self._blocks = source, blocks
        first = next(blocks)
        self._text, self._at, self._line = first.text, 0, first.line
        self._dropped = 0  # characters of the line before the text

    def array(self) -> Iterator[Value]:
        """The elements of the file's only array."""
        self._skip_space()
        self._advance(self._at + 1)  # the bracket
        while self._skip_space() != "]":
            yield self._value()
            mark = self._skip_space()
            if mark == ",":
                self._advance(self._at + 1)
            elif not mark:
                raise complaint(self._source, self._line, _CUT_OFF)
            elif mark != "]":
                raise self._wrong("Expecting ',' delimiter", self._at)
        self._advance(self._at + 1)
        if self._skip_space():
            raise complaint(
                self._source,
                self._line,
                "found more after the array; expected one array, or one value on each line",
            )

    def values(self) -> Iterator[Value]:
        """Values with only white space between them."""
        while self._skip_space():
            yield self._value()

    def _value(self) -> Value:
        while True:
            try:
                value, end = _decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut_off = (
                    error.msg.startswith("Unterminated string")
                    or error.pos > len(self._text) - _LONGEST_ESCAPE
                )
                if cut_off and self._read_on():
                    continue
                if error.msg.startswith("Unterminated") or error.pos >= len(self._text):
                    raise complaint(self._source, self._line, _CUT_OFF) from None
                raise self._wrong(error.msg, error.pos) from None
            except (ValueError, RecursionError):
                raise complaint(self._source, self._line, _NOT_READABLE) from None
            if end == len(self._text) and isinstance(value, (int, float)) and self._read_on():
                continue  # a number may continue
            found = Value(self._line, value)
            self._advance(end)
            return found

    def _skip_space(self) -> str:
        """Go to the next character that is not white space, and return it, or "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._advance(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def _advance(self, at: int) -> None:
        self._line += self._text.count("\n", self._at, at)
        self._at = at

    def _read_on(self) -> bool:
        """Read at least as much again as is held, so that parsing takes linear time in total."""
        held = len(self._text) - self._at
        if held > lines.MAX_LINE_CHARACTERS:
            limit = f"{lines.MAX_LINE_CHARACTERS:,} characters"
            raise complaint(self._source, self._line, f"a value is longer than {limit}")
        parts, size = [], 0
        for block in self._blocks:
            parts.append(block.text)
            size += len(block.text)
            if size >= held:
                break
        if not parts:
            return False
        self._dropped = self._column(self._at) - 1
        self._text, self._at = "".join([self._text[self._at :], *parts]), 0
        return True

    def _column(self, at: int) -> int:
        line_start = self._text.rfind("\n", 0, at) + 1
        return at - line_start + 1 + (0 if line_start else self._dropped)

    def _wrong(self, message: str, at: int) -> ValueError:
        line = self._line + self._text.count("\n", self._at, at)
        return complaint(self._source, line, _not_json(message, self._column(at)))
