"""The published checkpoints, recognised by their size and SHA-256."""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import threading
from pathlib import Path
from typing import Any

_WINDOW = 16 << 20  # bytes of a file mapped at a time; mapped pages count as memory


@dataclasses.dataclass(frozen=True)
class Published:
    """One published checkpoint; `vocab_sha256` is computed without the final newline."""

    name: str
    prefix: str
    rows: int
    data_bytes: int
    data_sha256: str
    bin_sha256: str
    vocab_sha256: str

    def source(self) -> dict[str, Any]:
        """The `source` metadata of a converted file."""
        step = int(self.prefix.rpartition("-")[2])
        return {
            "name": self.prefix,
            "step": step,
            "sha256": self.data_sha256,
            "published": self.name,
        }


PUBLISHED = (
    Published(
        name="GPT2_ML, 15G corpus",
        prefix="model.ckpt-100000",
        rows=21_130,
        data_bytes=5_585_033_776,
        data_sha256="4a6e5124df8db7ac2bdd902e6191b807a6983a7f5d09fb10ce011f9a073b183e",
        bin_sha256="f82940073239a24d17d3d9b549b0671773d9dccc06284fd872ee121831271131",
        vocab_sha256="8550a78ca2dd304e6a4b45baa9780db8a93cfacc564b4d1c319905db0122f1e4",
    ),
    Published(
        name="GPT2_ML, 30G corpus",
        prefix="model.ckpt-220000",
        rows=8_021,
        data_bytes=5_504_439_644,
        data_sha256="e698cc97a7f5f706f84f58bb469d614e51d3c0ce5f9ab9bf77e01e3fcb41d482",
        bin_sha256="971f187fd72dc6bea547259daa92b2b5e73732825cc49b82c2d34bc20e39460d",
        vocab_sha256="a25692ff268cd5d2468a66601ad746c49251bcc0b5a330592708bbe89ef67d02",
    ),
)


def by_size(data_bytes: int) -> Published | None:
    """The published TensorFlow checkpoint whose data file has this size."""
    return next((known for known in PUBLISHED if known.data_bytes == data_bytes), None)


def may_be(size: int, kind: str) -> bool:
    """Whether a file of this size may be a published one, and is worth hashing."""
    if kind == "tf":
        return by_size(size) is not None
    return size > min(known.data_bytes for known in PUBLISHED) * 0.99  # .bin sizes aren't known


def by_hash(sha256: str) -> Published | None:
    """The published checkpoint whose TensorFlow or PyTorch file has this hash."""
    return next((p for p in PUBLISHED if sha256 in (p.data_sha256, p.bin_sha256)), None)


def vocabulary_matches(known: Published, text: str) -> bool:
    """Whether a vocabulary is the published one, with or without a final newline."""
    return hashlib.sha256(text.removesuffix("\n").encode()).hexdigest() == known.vocab_sha256


def file_sha256(path: Path, stop: threading.Event) -> str | None:
    """The SHA-256 of a file, or None once `stop` is set; other threads can run meanwhile."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        for start in range(0, size, _WINDOW):
            if stop.is_set():
                return None
            length = min(_WINDOW, size - start)
            with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start) as window:
                digest.update(window)
    return digest.hexdigest()
