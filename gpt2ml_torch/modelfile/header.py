"""The header of a safetensors file: parse and check one, or build one.

Every size is checked against the file's real length before anything is allocated, and the tensors
must fill the file without gap or overlap.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Mapping
from typing import Any

from gpt2ml_torch.modelfile.format import DTYPES, TensorSpec, byte_size

MAX_HEADER = 16 << 20  # bytes; ours take about 0.4 MB, and parsing takes many times the memory
ALIGNMENT = 4096  # bytes: a page, with which writing and mapping large tensors is fastest
CURE = "make it again with `python -m convert`"

_NAMES = {code: name for name, (code, _) in DTYPES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor as the header declares it; `start` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


def header_length(prefix: bytes, size: int) -> int:
    """The length of the header in a file of `size` bytes that begins with `prefix`, 8 bytes."""
    if size < 8:
        raise ValueError(f"{size} bytes are too few for a safetensors file; {CURE}")
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


def parse_header(text: bytes) -> dict[str, Any]:
    """The header's JSON object; raises `ValueError` for anything else, or a name given twice."""
    if not text.startswith(b"{"):
        raise ValueError(f"not a safetensors file: the header is not JSON; {CURE}")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except _DuplicateError as error:
        raise ValueError(f"damaged: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"not a safetensors file: the header is not JSON ({error}); {CURE}"
        ) from None
    return dict(header)


class _DuplicateError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _DuplicateError(f"{twice[:80]!r} is in the header twice")
    return result


def check_entries(header: Mapping[str, Any], data_start: int, size: int) -> dict[str, TensorInfo]:
    """The tensors, checked to fill the data without gap or overlap.

    Raises `ValueError` if one is out of bounds or does not have the size of its shape.
    """
    tensors = {name: _check_entry(name, entry, data_start) for name, entry in header.items()}
    end, previous = data_start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            fault = "overlaps" if info.start < end else "leaves a gap after"
            raise ValueError(f"damaged: tensor {name[:80]!r} {fault} {previous}; {CURE}")
        end, previous = info.end, repr(name[:80])
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
    dtype = _NAMES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"tensor {name[:80]!r} has the unknown dtype {str(entry['dtype'])[:40]!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise ValueError(f"damaged: tensor {name[:80]!r} has an impossible shape or place")
    start, end = offsets
    needed = math.prod(shape) * DTYPES[dtype][1]
    if end - start != needed:
        raise ValueError(
            f"damaged: tensor {name[:80]!r} of shape {shape} takes {needed} bytes, "
            f"its place has {end - start}"
        )
    return TensorInfo(
        dtype=dtype, shape=tuple(shape), start=data_start + start, end=data_start + end
    )


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def build_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], *, reserve: int = 0
) -> tuple[bytes, dict[str, int], int]:
    """The header, each tensor's offset in the data, and the size of the data.

    The header is padded so that the data begin aligned. The format allows no holes, so further
    alignment comes from the order: tensors whose size keeps the next one aligned come first.
    """
    sizes = {name: byte_size(spec) for name, spec in specs.items()}
    order = sorted(specs, key=lambda name: -_alignment(sizes[name]))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name in order:
        dtype, shape = specs[name]
        starts[name] = end
        end += sizes[name]
        entries[name] = {
            "dtype": DTYPES[dtype][0],
            "shape": list(shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * reserve
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, starts, end


def _alignment(size: int) -> int:
    """The largest power of two, up to `ALIGNMENT`, that divides the size."""
    return min(size & -size, ALIGNMENT) if size else ALIGNMENT
