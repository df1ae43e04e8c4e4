"""The one file: weights, configuration, vocabulary and origin together, never mispaired.

A safetensors file whose metadata holds, beside the customary `format`:

    gpt2ml_format   version of this layout
    config          JSON, the fields of `GPT2MLConfig`
    vocab           the vocabulary file's exact text, if there is one
    source          JSON: where the weights come from (name, step, sha256, ...)
    generation      JSON: defaults for generation, if any
    quantization    "int8" or "int4" where the large matrices are packed (`modelfile.format`)

Beside the weights it may keep the optimizer's statistics, which only fine-tuning asks for.
Files come from strangers: every size is checked against the file's real length before anything is
allocated.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.kernels import packing
from gpt2ml_torch.modelfile.format import (
    QUANTIZATIONS,
    SCALE,
    SLOT,
    WEIGHT_DTYPES,
    expected_slots,
    expected_tensors,
    packed_precision,
    plain_weights,
)
from gpt2ml_torch.modelfile.safetensors_reader import CURE, TensorInfo, check_entries, read_header
from gpt2ml_torch.modelfile.safetensors_writer import TensorSpec, dtype_name
from gpt2ml_torch.modelfile.writer import (
    FORMAT_VERSION,
    CheckpointWriter,
    check_names,
    check_vocab,
    save,
)

__all__ = [
    "CheckpointMetadata",
    "CheckpointWriter",
    "load_optimizer_slots",
    "load_tensors",
    "read_metadata",
    "save",
]

PIECE_BYTES = 4 << 20  # of a tensor that is converted or moved: they stay in the cache

_ROWS_MULTIPLE = 16  # packed together


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """All that the file says apart from the weights themselves."""

    config: GPT2MLConfig
    vocab: str | None
    source: dict[str, Any]
    generation: dict[str, Any]
    quantization: str | None
    tensors: dict[str, TensorInfo]  # the weights
    slots: dict[str, TensorInfo]  # the optimizer's statistics, if they were kept

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that all weights share, but for those that are packed."""
        return self.tensors["position_embedding.weight"].dtype


def read_metadata(path: str | os.PathLike[str]) -> CheckpointMetadata:
    """Read and check everything but the weights.

    Raises `OSError` where there is no file to read, and `ValueError` where it is damaged, hostile,
    not one of ours, or of a later version.
    """
    header, data_start, size = read_header(Path(path))
    try:
        custom = _check_custom(header.pop("__metadata__", None), header)
        entries = check_entries(header, data_start, size)
        slots = {name: info for name, info in entries.items() if name.startswith(SLOT)}
        tensors = {name: info for name, info in entries.items() if name not in slots}
        config = GPT2MLConfig.from_dict(_parse_object(custom["config"], "config"))
        vocab = custom.get("vocab")
        check_vocab(vocab, config)
        quantization = custom.get("quantization")
        _check_tensors(tensors, config, quantization)
        if slots:
            _check_specs(slots, expected_slots(config), "the optimizer in the file")
        return CheckpointMetadata(
            config=config,
            vocab=vocab,
            source=_parse_object(custom.get("source", "{}"), "source"),
            generation=_parse_object(custom.get("generation", "{}"), "generation"),
            quantization=quantization,
            tensors=tensors,
            slots={name.removeprefix(SLOT): info for name, info in slots.items()},
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
    None; packed weights stay as they are).

    On the CPU in the file's dtype they are memory-mapped, private to this process: nothing is read
    before it is used, and changing them does not change the file. Otherwise, and where they are
    packed, they are read piece by piece, never two whole copies at a time.
    """
    metadata = read_metadata(path)
    device = torch.device(device)
    packed = metadata.quantization is not None
    if device.type == "cpu" and dtype in (None, metadata.dtype) and not packed:
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in metadata.tensors}
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from None
    tensors: dict[str, Tensor] = {}
    for name, first, rows in stream_rows(path, metadata):
        if name not in tensors:
            plain = packed_precision(name.removesuffix(SCALE), metadata.quantization) is None
            wanted = dtype if dtype is not None and plain else rows.dtype
            tensors[name] = _empty(metadata.tensors[name].shape, wanted, device)
        tensors[name][first : first + len(rows)].copy_(rows)
    return tensors


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu" or dtype.is_floating_point:
        return torch.empty(shape, dtype=dtype, device=device)
    return packing.empty_in_huge_pages(shape, dtype)


def read_tensor(path: str | os.PathLike[str], info: TensorInfo) -> Tensor:
    """One tensor of a file in memory of its own: mapped pages would stay as well once read."""
    tensor = torch.empty(info.shape, dtype=info.dtype)
    with open(path, "rb") as file:
        file.seek(info.start)
        data = tensor.view(-1).view(torch.uint8).numpy().data
        if file.readinto(data) != len(data):
            raise ValueError(f"{path} became shorter while it was read")
    return tensor


def load_optimizer_slots(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The statistics of the optimizer that made the weights, if the file kept them: those of
    `layout.slot_shapes`, or none.

    Memory-mapped, and checked as by `read_metadata`.
    """
    names = read_metadata(path).slots
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(SLOT + name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def stream_rows(
    path: str | os.PathLike[str], metadata: CheckpointMetadata
) -> Iterator[tuple[str, int, Tensor]]:
    """The file's tensors in pieces: a name, the first row, and rows that are valid until the next.

    Rows come in multiples of 16 but for a tensor's last. They are read into a buffer rather than
    mapped, since mapped pages stay in memory once they are read.
    """
    buffer = bytearray(PIECE_BYTES)
    with open(path, "rb") as file:
        for name, info in metadata.tensors.items():
            row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
            count = max(PIECE_BYTES // row_bytes // _ROWS_MULTIPLE, 1) * _ROWS_MULTIPLE
            if count * row_bytes > len(buffer):
                buffer = bytearray(count * row_bytes)
            file.seek(info.start)
            for first in range(0, info.shape[0], count):
                shape = (min(count, info.shape[0] - first), *info.shape[1:])
                view = memoryview(buffer)[: shape[0] * row_bytes]
                if file.readinto(view) != len(view):
                    raise ValueError(f"{path} became shorter while it was read")
                rows = torch.frombuffer(buffer, dtype=info.dtype, count=math.prod(shape))
                yield name, first, rows.view(shape)


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
        raise ValueError(f"damaged: the metadata lack 'config'; {CURE}")
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
    return f"it holds {len(names)} tensors ({shown}{more}) and no configuration; {CURE}"


def _check_tensors(
    tensors: Mapping[str, TensorInfo], config: GPT2MLConfig, quantization: str | None
) -> None:
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(f"weights quantised as {quantization[:40]!r}; update gpt2ml_torch")
    expected = expected_tensors(config, _float_dtype(tensors, config, quantization), quantization)
    _check_specs(tensors, expected, "the file")


def _check_specs(
    tensors: Mapping[str, TensorInfo], expected: Mapping[str, TensorSpec], where: str
) -> None:
    """Raise `ValueError` unless the tensors are these, of these dtypes and shapes."""
    check_names(tensors, expected, where)
    for name, (wanted, shape) in expected.items():
        info = tensors[name]
        if info.shape != tuple(shape):
            raise ValueError(
                f"tensor {name!r} has shape {info.shape}; the configuration says {tuple(shape)}"
            )
        if dtype_name(info.dtype) != wanted:
            raise ValueError(f"tensor {name!r} is {dtype_name(info.dtype)}; expected {wanted}")


def _float_dtype(
    tensors: Mapping[str, TensorInfo], config: GPT2MLConfig, quantization: str | None
) -> str:
    """The one dtype of the weights that are not packed."""
    plain = plain_weights(config, quantization)
    dtypes = {dtype_name(tensors[name].dtype) for name in plain if name in tensors}
    if len(dtypes) > 1 or not dtypes <= set(WEIGHT_DTYPES):
        found = ", ".join(sorted(dtypes))
        raise ValueError(f"weights of {found}; expected one of {', '.join(WEIGHT_DTYPES)}")
    return dtypes.pop() if dtypes else "float32"


def _parse_object(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged: {what} in the metadata is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"damaged: {what} in the metadata is not a JSON object")
    return value
