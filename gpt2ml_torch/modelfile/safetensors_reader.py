"""The header of a safetensors file from a stranger, read so that it can do no harm.

Every size is checked against the file's real length before anything is allocated, and the tensors
must fill the file without gap or overlap.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpt2ml_torch.modelfile.safetensors_writer import DTYPES

# Opening a pipe must not wait for a writer; and Windows must not translate line ends.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

MAX_HEADER = 32 << 20  # bytes; ours take about 0.3 MB, and parsing costs ten times as much memory
CURE = "make it again with `python -m convert`"

_DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for name, (code, _) in DTYPES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor as the header declares it; `start` and `end` are bytes from the beginning of the
    file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's JSON, where the data begin, and the file's size."""
    try:
        fd = os.open(path, os.O_RDONLY | _NO_WAIT)
    except OSError as error:
        raise type(error)(
            error.errno, f"can't read the model file {path}: {error.strerror}"
        ) from None
    try:
        size = _file_size(fd, path)
        with open(fd, "rb", closefd=False) as file:
            length = _header_length(file.read(8), size)
            header = _parse_header(file.read(length))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    finally:
        os.close(fd)
    return header, 8 + length, size


def _file_size(fd: int, path: Path) -> int:
    status = os.fstat(fd)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(
            errno.EISDIR,
            f"{path} is a folder; expected a .safetensors file (`python -m convert` makes one)",
        )
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, f"{path} is not a regular file")
    return status.st_size


def _header_length(prefix: bytes, size: int) -> int:
    if size < 8:
        raise ValueError(f"{size} bytes are no safetensors file; {CURE}")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER and prefix.startswith((b"PK\x03\x04", b"\x80")):
        raise ValueError(
            "this is a pickled PyTorch file, not a converted model; `python -m convert` turns it "
            "into one"
        )
    if length > MAX_HEADER:
        raise ValueError(
            f"not a safetensors file: its header would take {length} bytes, more than "
            f"{MAX_HEADER}; {CURE}"
        )
    if length > size - 8:
        raise ValueError(
            f"truncated: found {size} bytes, the header alone ends at {length + 8}; copy or {CURE}"
        )
    return int(length)


def _parse_header(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise ValueError(f"not a safetensors file: the header is not JSON; {CURE}")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except _Duplicate as error:
        raise ValueError(f"damaged: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"not a safetensors file: the header is not JSON ({error}); {CURE}"
        ) from None
    return dict(header)


class _Duplicate(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Duplicate(f"{twice!r} is in the header twice")
    return result


def check_entries(header: Mapping[str, Any], data_start: int, size: int) -> dict[str, TensorInfo]:
    """Every tensor in bounds, of the size that its shape takes, and all of them together without
    gap or overlap."""
    tensors = {name: _check_entry(name, entry, data_start) for name, entry in header.items()}
    end, previous = data_start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            fault = "overlaps" if info.start < end else "leaves a gap after"
            raise ValueError(f"damaged: tensor {name!r} {fault} {previous}; {CURE}")
        end, previous = info.end, repr(name)
    if size < end:
        raise ValueError(f"truncated: found {size} bytes, expected {end}; copy or {CURE}")
    if size > end:
        raise ValueError(f"damaged: found {size} bytes, expected {end}; copy or {CURE}")
    return tensors


def _check_entry(name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"damaged: tensor {name[:80]!r} is not described by dtype, shape and offsets"
        )
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"tensor {name[:80]!r} has the unknown dtype {str(entry['dtype'])[:40]!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise ValueError(f"damaged: tensor {name[:80]!r} has an impossible shape or place")
    start, end = offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"damaged: tensor {name[:80]!r} of shape {shape} takes "
            f"{math.prod(shape) * dtype.itemsize} bytes, "
            f"its place has {end - start}"
        )
    return TensorInfo(
        dtype=dtype, shape=tuple(shape), start=data_start + start, end=data_start + end
    )


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
