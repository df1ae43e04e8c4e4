"""Transposing large matrices at the speed of memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from convert.sources import Array

_ROWS, _LINES = 256, 256  # of a block that stays in the processor's caches
_GAP = 16  # numbers
_PIECE = 512 << 10  # bytes


def rows_in_order(tensor: Array) -> Iterator[Array]:
    """Some rows of a vector, a matrix or a transposed matrix at a time, contiguous in memory: few
    enough to be still in the processor's cache when they are used.

    Each piece may lie where the last one lay: use it before taking the next. (Fresh memory for each
    would cost a quarter of the time.)
    """
    if tensor.ndim == 1:
        tensor = np.ascontiguousarray(tensor)
    if tensor.flags.c_contiguous:
        yield from _pieces(tensor)
        return
    result = np.empty((_ROWS, tensor.shape[1]), tensor.dtype)
    block = np.empty((_LINES, _ROWS + _GAP), tensor.dtype)
    for start in range(0, len(tensor), _ROWS):
        rows = tensor[start : start + _ROWS]
        _gather(rows, result, block)
        yield from _pieces(result[: len(rows)])


def _pieces(tensor: Array) -> Iterator[Array]:
    step = max(1, _PIECE // max(tensor[:1].nbytes, 1))
    for start in range(0, len(tensor), step):
        yield tensor[start : start + step]


def _gather(rows: Array, result: Array, block: Array) -> None:
    """Rows that lie across memory, in order.

    By way of a small block with a gap after each line: the lines of a matrix, often a multiple of a
    large power of two apart, share a few places in the cache and drive each other out, which costs
    half the speed.
    """
    for start in range(0, rows.shape[1], _LINES):
        across = rows[:, start : start + _LINES].T
        part = block[: across.shape[0], : across.shape[1]]
        part[...] = across
        result[: len(rows), start : start + _LINES] = part.T
