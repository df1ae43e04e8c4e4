"""JSON that every parser reads in the same way.

NaN and infinity, which JSON lacks, become null. A name with two values is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, *, sort_keys: bool = False, ascii_only: bool = False) -> str:
    """The JSON text of a value of JSON types; NaN and infinity become null."""
    return json.dumps(finite(value), ensure_ascii=ascii_only, sort_keys=sort_keys, allow_nan=False)


def finite(value: Any) -> Any:
    """A value of JSON types with None in place of every NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


class ContradictionError(ValueError):
    """A name in a JSON object has two values."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dictionary for a JSON object's pairs: an `object_pairs_hook` for `json.loads`.

    Raises `ContradictionError` if a name is given twice with different values.
    """
    result: dict[str, Any] = {}
    for name, value in pairs:
        if repr(result.setdefault(name, value)) != repr(value):
            both = f"{str(result[name])[:40]!r} and {str(value)[:40]!r}"
            raise ContradictionError(f"{name[:80]!r} is {both}")
    return result
