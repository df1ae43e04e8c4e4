"""Damaged and random Snappy blocks: decompressed or refused, in bounded time and memory."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

from convert import bundle
from scripts.attacks.tools import ALLOWED, CHECKPOINT, damaged

LARGEST = 64 << 20  # bytes of memory, however large a block claims to be


class Attack:
    def __init__(self, folder: Path) -> None:
        index = next(CHECKPOINT.glob("*.index"))
        self._index = index.read_bytes()

    def __call__(self, draw: random.Random) -> None:
        if draw.random() < 0.5:
            block = draw.randbytes(draw.randrange(1, 300))
        else:
            start = draw.randrange(len(self._index))
            block = damaged(
                draw, bundle.varint(draw.choice((10, 1000, 2**31))) + self._index[start:]
            )
        tracemalloc.start()
        try:
            bundle.uncompress(block)
        except ALLOWED:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < LARGEST, f"{len(block)} bytes took {peak}"
