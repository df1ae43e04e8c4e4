"""The cache folder, for data that can be made again: compiled code and tokenised texts."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "GPT2ML_CACHE"


def cache_root() -> Path:
    """The folder of all caches: $GPT2ML_CACHE, or gpt2ml in the user's cache folder.

    The folder may not exist yet. Raises `OSError` if it can't be determined without a home folder.
    """
    configured = os.environ.get(VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        if configured:
            return Path(configured).expanduser()
        if base and Path(base).is_absolute():  # XDG's specification: ignore a relative one
            return Path(base) / "gpt2ml"
        return Path.home() / ".cache" / "gpt2ml"
    except RuntimeError as error:  # pathlib's error if there is no home folder
        raise OSError(f"no place for a cache: {error} Set {VARIABLE} to a folder") from None
