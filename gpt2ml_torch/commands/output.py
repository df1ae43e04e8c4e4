"""What commands print: text that can't steer a terminal, and JSON that is always valid."""

from __future__ import annotations

import json
import math
import sys
import unicodedata
from collections.abc import Mapping
from typing import Any

_STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats, surrogates, line separators


def one_line(text: str) -> str:
    """`text` in one line, with an escape for each character that could steer a terminal.

    For errors and names, which may come from files of strangers.
    """
    return "".join(map(_escaped, " ".join(text.split())))


def printable(text: str) -> str:
    """`text` with its lines and tabs, and escapes for all other control characters."""
    if text.isprintable():  # the usual case, in one call
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else _escaped(c) for c in text
    )


def write_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object a line: NaN and infinities as null, in ASCII where the encoding of
    standard output lacks a character.
    """
    finite = _finite(values)
    text = json.dumps(finite, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(finite, allow_nan=False)
    print(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _STEERING:
        return character
    return character.encode("unicode_escape").decode("ascii")
