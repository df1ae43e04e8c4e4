"""Transposing large matrices at the speed of memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from convert.sources import Array

_ROWS, _LINES = 128, 512  # of a block that stays in the processor's caches
_GAP = 16  # numbers
_PIECE = 512 << 10  # bytes


def rows_in_order(tensor: Array) -> Iterator[Array]:
    """Some rows of a vector, a matrix or a transposed matrix at a time, contiguous in memory: few
    enough to be still in the processor's cache when they are used."""
    straight = tensor.flags.c_contiguous
    step = max(1, _PIECE // max(tensor[:1].nbytes, 1)) if straight else _ROWS
    for start in range(0, len(tensor), step):
        rows = tensor[start : start + step]
        yield rows if straight else _gather(rows)


def _gather(rows: Array) -> Array:
    """Rows that lie across memory, in order.

    By way of a small block with a gap after each line: the lines of a matrix, often a multiple of a
    large power of two apart, share a few places in the cache and drive each other out, which costs
    half the speed.
    """
    result = np.empty(rows.shape, rows.dtype)
    memory = np.empty((_LINES, _ROWS + _GAP), rows.dtype)
    for start in range(0, rows.shape[1], _LINES):
        across = rows[:, start : start + _LINES].T
        block = memory[: across.shape[0], : across.shape[1]]
        block[...] = across
        result[:, start : start + _LINES] = block.T
    return result
