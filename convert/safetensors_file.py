"""A safetensors file in another program's layout, as a source.

The format has no checksums. The safetensors library checks the header. The tensors are then
memory-mapped here, since the library's NumPy interface lacks bfloat16.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from convert import mapping
from convert.source import Array, Source, Stored, mapped, storage_dtype, widened
from gpt2ml_torch.modelfile.format import DTYPES

_DTYPES = {code: name for name, (code, _) in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the library's own limit


class SafetensorsFile(Source):
    """One safetensors file that this project did not write.

    Raises `ValueError` for a damaged file or one that is converted already, and `OSError` if it
    can't be read.
    """

    layouts = mapping.PYTORCH
    checksum = None

    def __init__(self, path: Path) -> None:
        self._path = path
        if is_converted(path):
            raise ValueError(converted_already(path))
        header, self._data_start = _read_header(path)
        header.pop("__metadata__", None)
        self._places = {name: entry["data_offsets"][0] for name, entry in header.items()}
        super().__init__(path.name, [path], {name: _stored(e) for name, e in header.items()})

    def read(self, name: str) -> Array:
        stored = self.tensors[name]
        assert stored.dtype is not None
        dtype = storage_dtype(stored.dtype)
        size = math.prod(stored.shape) * dtype.itemsize
        data = mapped(self._path, self._data_start + self._places[name], size)
        array: Array = np.frombuffer(data, dtype).reshape(stored.shape)
        return widened(array) if stored.dtype == "bfloat16" else array


def is_converted(path: Path) -> bool:
    """Whether a file is a model file of this project."""
    try:
        with safe_open(path, framework="np") as file:
            return "gpt2ml_format" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def converted_already(path: Path) -> str:
    """The error for a file that is converted already."""
    return (
        f"{path} is a converted safetensors file already: `gpt2ml generate` takes it as it is, and "
        "`gpt2ml convert --to-tf` converts it back to TensorFlow"
    )


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, checked by the library, and the offset of the data."""
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise ValueError(f"its header would take {length:,} bytes")
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or truncated: {_reason(error)}; fetch it again"
        ) from None
    except (ValueError, RecursionError, struct.error) as error:
        raise ValueError(f"{path} is damaged: {error}; fetch it again") from None
    return header, 8 + length


def _stored(entry: Mapping[str, Any]) -> Stored:
    dtype = _DTYPES.get(entry["dtype"])
    return Stored(dtype, tuple(entry["shape"]), instead=f"numbers of type {entry['dtype']}")


def _reason(error: SafetensorError) -> str:
    return str(error).removeprefix("Error while deserializing header: ").strip()[:200]
