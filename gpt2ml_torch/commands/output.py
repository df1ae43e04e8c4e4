"""What commands print: text that can't steer a terminal, and JSON that is always valid."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Mapping
from typing import Any

from gpt2ml_torch.valid_json import to_json

_STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats, surrogates, line separators


def one_line(text: str) -> str:
    """`text` in one line, with an escape for each character that could steer a terminal.

    For errors and names, which may come from files of strangers.
    """
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    """`text` with its spaces, and an escape for each character that could steer a terminal."""
    return "".join(map(_escaped, text))


def printable(text: str) -> str:
    """`text` with its lines and tabs, and escapes for all other control characters."""
    if text.isprintable():  # the usual case, in one call
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else _escaped(c) for c in text
    )


def write_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object a line: NaN and infinities as null, escapes for characters that could
    steer a terminal, and for all but ASCII where the encoding of standard output lacks one.
    """
    text = to_json(values)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = to_json(values, ascii_only=True)
    print(text if text.isprintable() else "".join(map(_escaped_in_json, text)))


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _STEERING:
        return character
    return character.encode("unicode_escape").decode("ascii")


def _escaped_in_json(character: str) -> str:
    return (
        character
        if unicodedata.category(character) not in _STEERING
        else to_json(character, ascii_only=True).strip('"')
    )
