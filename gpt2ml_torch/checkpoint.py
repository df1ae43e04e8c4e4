"""The one file: weights, configuration, vocabulary and origin together, never mispaired.

A safetensors file whose metadata holds, beside the customary `format`:

    gpt2ml_format   version of this layout
    config          JSON, the fields of `GPT2MLConfig`
    vocab           the vocabulary file's exact text, if there is one
    source          JSON: where the weights come from (name, step, sha256, ...)
    generation      JSON: defaults for generation, if any

Files come from strangers: every size is checked against the file's real length before anything is
allocated.
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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.safetensors_writer import DTYPE_NAMES, SafetensorsWriter

FORMAT_VERSION = 1
MAX_HEADER = 32 << 20  # bytes; ours take about 0.3 MB, and parsing costs ten times as much memory
# Bytes of mapped weights that may be resident while they are converted or moved.
RELEASE_EVERY = 256 << 20

_RESERVE = 2 << 10  # bytes of the header kept free for `CheckpointWriter.set_source`
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CURE = "make it again with `python -m convert`"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor as the header declares it; `start` and `end` are bytes from the beginning of the
    file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """All that the file says apart from the weights themselves."""

    config: GPT2MLConfig
    vocab: str | None
    source: dict[str, Any]
    generation: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that all weights of the file share."""
        return next(iter(self.tensors.values())).dtype


def expected_shapes(config: GPT2MLConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of a model of these sizes, in the order in which it is used; linear weights are
    (out, in)."""
    width, mlp = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (config.vocab_size, width),
        "position_embedding.weight": (config.max_position_embeddings, width),
        "embedding_norm.weight": (width,),
        "embedding_norm.bias": (width,),
    }
    linears = {
        "attention.qkv": (3 * width, width),
        "attention.output": (width, width),
        "mlp.up": (mlp, width),
        "mlp.down": (width, mlp),
    }
    for layer in range(config.num_hidden_layers):
        for name, (outputs, inputs) in linears.items():
            shapes[f"blocks.{layer}.{name}.weight"] = (outputs, inputs)
            shapes[f"blocks.{layer}.{name}.bias"] = (outputs,)
        for name in ("mlp_norm", "output_norm"):
            shapes[f"blocks.{layer}.{name}.weight"] = (width,)
            shapes[f"blocks.{layer}.{name}.bias"] = (width,)
    return shapes


class CheckpointWriter(SafetensorsWriter):
    """Writes the one file tensor by tensor: `with CheckpointWriter(...) as w: w.write(name,
    tensor)`.

    Every name of `expected_shapes(config)` must be written, in `dtype`. Raises as
    `SafetensorsWriter` does.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: GPT2MLConfig,
        *,
        dtype: torch.dtype,
        vocab: str | None = None,
        source: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        if dtype not in _WEIGHT_DTYPES:
            raise ValueError(f"weights of {dtype}; expected one of {_names(_WEIGHT_DTYPES)}")
        _check_vocab(vocab, config)
        self._custom = {
            "format": "pt",
            "gpt2ml_format": str(FORMAT_VERSION),
            "config": _to_json(config.to_dict()),
            "source": _to_json(dict(source or {})),
        }
        if generation:
            self._custom["generation"] = _to_json(dict(generation))
        if vocab is not None:
            self._custom["vocab"] = vocab
        specs = {name: (dtype, shape) for name, shape in expected_shapes(config).items()}
        super().__init__(path, specs, self._custom, overwrite=overwrite, reserve=_RESERVE)

    def set_source(self, source: Mapping[str, Any]) -> None:
        """Say where the weights come from, once that is known (a hash takes as long as reading)."""
        self.replace_metadata({**self._custom, "source": _to_json(dict(source))})


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: GPT2MLConfig,
    *,
    vocab: str | None = None,
    source: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    overwrite: bool = True,
) -> None:
    """Write a state dict; the file replaces an older one only when it is complete and checked.

    Raises `ValueError` for tensors that are not those of the configuration, or of several dtypes,
    and `OSError`.
    """
    expected = expected_shapes(config)
    _check_names(tensors, expected, "the state dict")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1:
        raise ValueError(
            f"weights of several dtypes, {_names(dtypes)}; convert the model to one first"
        )
    with CheckpointWriter(
        path,
        config,
        dtype=dtypes.pop(),
        vocab=vocab,
        source=source,
        generation=generation,
        overwrite=overwrite,
    ) as writer:
        for name in expected:
            writer.write(name, tensors[name])


def read_metadata(path: str | os.PathLike[str]) -> CheckpointMetadata:
    """Read and check everything but the weights.

    Raises `OSError` where there is no file to read, and `ValueError` where it is damaged, hostile,
    not one of ours, or of a later version.
    """
    header, data_start, size = _read_header(Path(path))
    try:
        custom = _check_custom(header.pop("__metadata__", None), header)
        tensors = _check_entries(header, data_start, size)
        config = GPT2MLConfig.from_dict(_parse_object(custom["config"], "config"))
        vocab = custom.get("vocab")
        _check_vocab(vocab, config)
        _check_tensors(tensors, config)
        return CheckpointMetadata(
            config=config,
            vocab=vocab,
            source=_parse_object(custom.get("source", "{}"), "source"),
            generation=_parse_object(custom.get("generation", "{}"), "generation"),
            tensors=tensors,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_tensors(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Load the weights, checked as by `read_metadata`, on a device and in a dtype (the file's, if
    None).

    On the CPU in the file's dtype they are memory-mapped, private to this process: nothing is read
    before it is used, and changing them does not change the file. Otherwise they are copied one by
    one, never two whole copies at a time.
    """
    metadata = read_metadata(path)
    device = torch.device(device)
    try:
        if device.type == "cpu" and dtype in (None, metadata.dtype):
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in metadata.tensors}
        return _copy_tensors(path, metadata, device, dtype or metadata.dtype)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def _copy_tensors(
    path: str | os.PathLike[str],
    metadata: CheckpointMetadata,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Mapped pages that were read stay in memory until the file is unmapped, so it is opened anew
    now and then."""
    tensors: dict[str, Tensor] = {}
    names = iter(metadata.tensors.items())
    while len(tensors) < len(metadata.tensors):
        resident = 0
        with safe_open(path, framework="pt") as file:
            for name, info in names:
                tensors[name] = file.get_tensor(name).to(device, dtype, copy=True)
                resident += info.end - info.start
                if resident >= RELEASE_EVERY:
                    break
    return tensors


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's JSON, where the data begin, and the file's size."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise type(error)(
            error.errno, f"can't read the model file {path}: {error.strerror}"
        ) from None
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(
                errno.EISDIR,
                f"{path} is a folder; expected a .safetensors file (`python -m convert` makes one)",
            )
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"{path} is not a regular file")
        size = status.st_size
        try:
            length = _header_length(file.read(8), size)
            header = _parse_header(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return header, 8 + length, size


def _header_length(prefix: bytes, size: int) -> int:
    if size < 8:
        raise ValueError(f"{size} bytes are no safetensors file; {_CURE}")
    if prefix.startswith((b"PK\x03\x04", b"\x80")):
        raise ValueError(
            "this is a pickled PyTorch file, not a converted model; `python -m convert` turns it "
            "into one"
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER:
        raise ValueError(
            f"not a safetensors file: its header would take {length} bytes, more than "
            f"{MAX_HEADER}; {_CURE}"
        )
    if length > size - 8:
        raise ValueError(
            f"truncated: found {size} bytes, the header alone ends at {length + 8}; copy or {_CURE}"
        )
    return int(length)


def _parse_header(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise ValueError(f"not a safetensors file: the header is not JSON; {_CURE}")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except _Duplicate as error:
        raise ValueError(f"damaged: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a safetensors file: the header is not JSON ({error})") from None
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


def _check_custom(custom: Any, entries: Mapping[str, Any]) -> dict[str, str]:
    """The metadata's strings, once known to be ours and of a version that this code reads."""
    if custom is None:
        custom = {}
    if not isinstance(custom, dict) or not all(isinstance(value, str) for value in custom.values()):
        raise ValueError("damaged: the metadata are not strings")
    version = custom.get("gpt2ml_format")
    if version is None:
        raise ValueError(f"a safetensors file, but not a converted GPT2_ML: {_what_it_is(entries)}")
    if not (version.isascii() and version.isdigit() and len(version) < 10 and int(version) >= 1):
        raise ValueError(f"damaged: gpt2ml_format is {version[:40]!r}; expected {FORMAT_VERSION}")
    if int(version) > FORMAT_VERSION:
        raise ValueError(
            f"format version {version}; this program reads up to {FORMAT_VERSION}: update "
            "gpt2ml_torch"
        )
    if "config" not in custom:
        raise ValueError(f"damaged: the metadata lack 'config'; {_CURE}")
    return custom


def _what_it_is(entries: Mapping[str, Any]) -> str:
    names = list(entries)
    if any(name.endswith(("wte.weight", "attn.c_attn.weight")) for name in names):
        return (
            "it looks like a model of transformers or the community's conversion (wte, c_attn); "
            "convert the original checkpoint or pytorch_model.bin instead"
        )
    if any(name.startswith("base_model.model.") for name in names):
        return "it looks like a LoRA adapter; load it on top of a converted model"
    shown = ", ".join(repr(name[:60]) for name in names[:3]) or "nothing"
    more = ", ..." if len(names) > 3 else ""
    return f"it holds {len(names)} tensors ({shown}{more}) and no configuration; {_CURE}"


def _check_entries(header: Mapping[str, Any], data_start: int, size: int) -> dict[str, TensorInfo]:
    """Every tensor in bounds, of the size that its shape takes, and all of them together without
    gap or overlap."""
    tensors = {name: _check_entry(name, entry, data_start) for name, entry in header.items()}
    end, previous = data_start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            fault = "overlaps" if info.start < end else "leaves a gap after"
            raise ValueError(f"damaged: tensor {name!r} {fault} {previous}; {_CURE}")
        end, previous = info.end, repr(name)
    if size < end:
        raise ValueError(f"truncated: found {size} bytes, expected {end}; copy or {_CURE}")
    if size > end:
        raise ValueError(f"damaged: found {size} bytes, expected {end}; copy or {_CURE}")
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


def _check_tensors(tensors: Mapping[str, TensorInfo], config: GPT2MLConfig) -> None:
    expected = expected_shapes(config)
    _check_names(tensors, expected, "the file")
    for name, shape in expected.items():
        info = tensors[name]
        if info.shape != shape:
            raise ValueError(
                f"tensor {name!r} has shape {info.shape}; the configuration says {shape}"
            )
    dtypes = {info.dtype for info in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(_WEIGHT_DTYPES):
        raise ValueError(f"weights of {_names(dtypes)}; expected one of {_names(_WEIGHT_DTYPES)}")


def _check_names(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    faults = []
    for what, names in (
        ("lacks", set(expected) - set(found)),
        ("has unknown", set(found) - set(expected)),
    ):
        if names:
            shown = ", ".join(name[:80] for name in sorted(names)[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            faults.append(f"{where} {what} {shown}{more}")
    if faults:
        raise ValueError(f"not the weights of this configuration: {'; '.join(faults)}")


def _check_vocab(vocab: str | None, config: GPT2MLConfig) -> None:
    if vocab is None:
        return
    try:
        vocab.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"damaged: the vocabulary is not valid Unicode ({error.reason})") from None
    lines = count_lines(vocab)
    if lines > config.vocab_size:
        raise ValueError(
            f"the vocabulary has {lines} lines, the model {config.vocab_size} rows: it belongs to "
            "another model"
        )


def count_lines(vocab: str) -> int:
    r"""Tokens in a vocabulary: lines ended by `\n` and nothing else (two tokens hold other line
    separators)."""
    return len(vocab.removesuffix("\n").split("\n")) if vocab else 0


def _parse_object(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged: {what} in the metadata is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"damaged: {what} in the metadata is not a JSON object")
    return value


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _names(dtypes: Any) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
