"""Output of commands: text that can't control a terminal, and JSON that is always valid."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Mapping
from typing import Any

from gpt2ml_torch.valid_json import to_json

_STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats, surrogates, line separators


def one_line(text: str) -> str:
    """`text` in one line, with an escape for each character that could control a terminal.

    For errors and names, which may come from strangers' files.
    """
    return escaped(" ".join(text.split()))


def escaped(text: str) -> str:
    """`text` with its spaces, and an escape for each character that could control a terminal."""
    return "".join(map(_escaped, text))


def printable(text: str) -> str:
    """`text` with its lines and tabs, and escapes for all other control characters."""
    if text.isprintable():  # the usual case, in one call
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else _escaped(c) for c in text
    )


def write_json(values: Mapping[str, Any]) -> None:
    """Print a JSON object in one line.

    NaN and infinity become null. Characters that could control a terminal are escaped, and all
    non-ASCII characters if standard output's encoding lacks any of them.
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
