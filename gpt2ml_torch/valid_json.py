"""JSON that every parser reads: NaN and infinity, which JSON lacks, become null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, *, sort_keys: bool = False, ascii_only: bool = False) -> str:
    """The JSON text of a value of JSON types."""
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
