"""Find the files with the training text: names, folders and globs become one ordered list.

The order numbers the documents, so it must not depend on the order of the file system.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz"}
TEXT_SUFFIXES = frozenset((".txt", ".text"))
JSON_SUFFIXES = frozenset((".jsonl", ".ndjson", ".json"))


@dataclass(frozen=True)
class Source:
    """One file of documents, and how to read it, by its name."""

    path: Path
    kind: Literal["text", "json"]
    compression: Literal["gzip", "zstd", "xz"] | None
    named: bool  # by the user or by a glob, rather than met in a folder


def find_sources(data: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> list[Source]:
    """Return the files that `data` names, in the order given, each once.

    An item is a file, a folder (searched recursively, in sorted order, for .txt, .text, .jsonl,
    .ndjson and .json, with or without .gz, .zst or .xz; hidden names are left out), or a glob in
    which `**` matches any folders. A file that is named itself is JSON Lines if its suffix says so,
    and otherwise text.

    Raises `OSError` for a name that does not exist and `ValueError` for a folder or glob without
    any such file.
    """
    items = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    if not items:
        raise ValueError("no data was named; expected files, folders or globs")
    sources: dict[str, Source] = {}
    for item in items:
        for source in _expand(os.fspath(item)):
            sources.setdefault(os.path.realpath(source.path), source)
    return list(sources.values())


def shown(path: str | os.PathLike[str]) -> str:
    """The path as shown in a message: in one line, with unusual characters escaped."""
    text = os.fspath(path)
    return text if text.isprintable() and text else repr(text)


def _expand(item: str) -> list[Source]:
    path = Path(item).expanduser()
    if path.is_dir():
        return _walk(path)
    if os.path.lexists(path):
        return [_source(path, named=True)]
    if not glob.has_magic(item):
        raise FileNotFoundError(f"no file or folder {shown(item)}; expected text or JSON Lines")
    matches = sorted(glob.glob(str(path), recursive=True))
    found = [
        source
        for match in map(Path, matches)
        for source in (_files_in(match) if match.is_dir() else [_source(match, named=True)])
    ]
    if not found:
        raise FileNotFoundError(f"no file matches {shown(item)}; check the pattern and the folder")
    return found


def _walk(folder: Path) -> list[Source]:
    found = _files_in(folder)
    if not found:
        raise ValueError(
            f"{shown(folder)} holds no file to read; expected .txt, .text, .jsonl, .ndjson or "
            ".json, also with .gz, .zst or .xz: rename the files, or name them one by one"
        )
    return found


def _files_in(folder: Path) -> list[Source]:
    def refuse(error: OSError) -> None:
        raise type(error)(f"cannot search {shown(folder)}: {error.strerror}") from None

    found = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and _suffix(name) in TEXT_SUFFIXES | JSON_SUFFIXES:
                found.append(_source(Path(root, name), named=False))
    return found


def _suffix(name: str) -> str:
    """The suffix that tells text from JSON Lines, in lower case, without the suffix of a
    compression.
    """
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _source(path: Path, *, named: bool) -> Source:
    return Source(
        path=path,
        kind="json" if _suffix(path.name) in JSON_SUFFIXES else "text",
        compression=COMPRESSIONS.get(path.suffix.lower()),  # type: ignore[arg-type]
        named=named,
    )


def regular_stat(path: Path) -> os.stat_result:
    """`os.stat` of a regular file; others raise, since a pipe can't be read twice."""
    try:
        found = path.stat()
    except OSError as error:
        raise type(error)(f"cannot read {shown(path)}: {error.strerror}") from None
    if not path.is_file():
        raise OSError(
            f"{shown(path)} is not a regular file; expected one that can be read twice: "
            "save what it gives to a file"
        )
    return found
