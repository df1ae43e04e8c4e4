"""A TensorFlow checkpoint as a source; each tensor's checksum is verified as it is read."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from crc32c import crc32c

from convert import bundle, locate, mapping, published
from convert.sources import Array, Entries, mapped, storage, widened
from convert.table import mask

_MAX_INDEX = 64 << 20  # bytes; the published ones have 26 KB


class TFSource:
    """One checkpoint, by its prefix.

    Raises `OSError` for missing or truncated files, saying how large they should be, and
    `ValueError` for damaged ones.
    """

    format: mapping.Format = "tf"

    def __init__(self, location: locate.Location) -> None:
        self.name = location.path.name
        self._prefix = location.path
        shards, self._entries = _read_index(location.index)
        self.entries: Entries = {
            name: (entry.dtype, entry.shape) for name, entry in self._entries.items()
        }
        try:
            self.data_files = locate.data_files(location.path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}{self._size_of_missing()}") from None
        if len(self.data_files) != shards:
            raise ValueError(
                f"{location.index} belongs to {shards} data files, found "
                f"{len(self.data_files)}; keep those of one checkpoint"
            )
        self._check_sizes()

    def read(self, name: str) -> Array:
        entry = self._entries[name]
        assert entry.dtype is not None
        data = mapped(self.data_files[entry.shard], entry.offset, entry.size)
        if mask(crc32c(data)) != entry.crc32c:
            raise ValueError(
                f"tensor {name!r} of {self._prefix} is damaged: its checksum is wrong; fetch the "
                "checkpoint again"
            )
        array = np.frombuffer(data, storage(entry.dtype)).reshape(entry.shape)
        return widened(array) if entry.dtype == "bfloat16" else array

    def step(self) -> int | None:
        if self.entries.get(mapping.TF_STEP) == ("int64", ()):
            return int(self.read(mapping.TF_STEP))
        return None

    def check(self) -> None:
        pass

    def _size_of_missing(self) -> str:
        """How large the missing data should be."""
        size = sum(entry.size for entry in self._entries.values())
        known = published.by_size(size)
        of = f" of the published {known.name}" if known else ""
        return f"; the index expects {size:,} bytes of data{of}, {len(self._entries):,} entries"

    def _check_sizes(self) -> None:
        expected: dict[int, int] = defaultdict(int)
        for entry in self._entries.values():
            expected[entry.shard] = max(expected[entry.shard], entry.offset + entry.size)
        for shard, size in expected.items():
            path = self.data_files[shard]
            found = path.stat().st_size
            if found < size:
                raise OSError(
                    f"{path} is truncated: found {found:,} bytes, the index expects {size:,}; "
                    "fetch it again"
                )


def _read_index(path: Path) -> tuple[int, dict[str, bundle.Entry]]:
    try:
        if path.stat().st_size > _MAX_INDEX:
            raise ValueError(f"it has more than {_MAX_INDEX:,} bytes")
        return bundle.read_index(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or no TensorFlow checkpoint: {error}; fetch it again"
        ) from None
