"""The one file: weights, configuration, vocabulary and origin together, never mispaired.

A safetensors file whose metadata holds, beside the customary `format`:

    gpt2ml_format   version of this layout
    config          JSON, the fields of `GPT2MLConfig`
    vocab           the vocabulary file's exact text, if there is one
    source          JSON: where the weights come from (name, step, sha256, ...)
    generation      JSON: defaults for generation, if any
    quantization    "int8" or "int4" where the large matrices are packed (`gpt2ml_torch.layout`)

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

from gpt2ml_torch import kernels
from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.kernels import packing
from gpt2ml_torch.layout import (
    QUANTIZATIONS,
    SCALE,
    expected_shapes,
    expected_tensors,
    packed_precision,
)
from gpt2ml_torch.safetensors_reader import CURE, TensorInfo, check_entries, read_header
from gpt2ml_torch.safetensors_writer import SafetensorsWriter

FORMAT_VERSION = 1
PIECE_BYTES = 4 << 20  # of a tensor that is converted or moved: they stay in the cache

_RESERVE = 2 << 10  # bytes of the header kept free for `CheckpointWriter.set_source`
_ROWS_MULTIPLE = 16  # packed together
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """All that the file says apart from the weights themselves."""

    config: GPT2MLConfig
    vocab: str | None
    source: dict[str, Any]
    generation: dict[str, Any]
    quantization: str | None
    tensors: dict[str, TensorInfo]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that all weights share, but for those that are packed."""
        return self.tensors["position_embedding.weight"].dtype


class CheckpointWriter(SafetensorsWriter):
    """Writes the one file tensor by tensor: `with CheckpointWriter(...) as w: w.write_weight(name,
    tensor)`.

    Every weight of `expected_shapes(config)` must be written, in `dtype`; with a `quantization` the
    large ones are packed on the way. Raises as `SafetensorsWriter` does.
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
        quantization: str | None = None,
        overwrite: bool = False,
    ) -> None:
        if quantization not in (None, *QUANTIZATIONS):
            raise ValueError(
                f"quantization is {quantization!r}; expected one of {', '.join(QUANTIZATIONS)}"
            )
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
        if quantization is not None:
            self._custom["quantization"] = quantization
        self._quantization = quantization
        if quantization is not None:
            kernels.load_kernels()  # here rather than in the threads that may write
        specs = expected_tensors(config, dtype, quantization)
        super().__init__(path, specs, self._custom, overwrite=overwrite, reserve=_RESERVE)

    def write_weight(self, name: str, tensor: Tensor) -> None:
        """Write one weight, floating point as the model has it, packed where the file packs it."""
        precision = packed_precision(name, self._quantization)
        if precision is None:
            return self.write(name, tensor)
        try:
            weight, scale = kernels.pack(tensor.detach().cpu(), precision)
        except ValueError as error:
            raise ValueError(f"tensor {name!r}: {error}") from None
        assert scale is not None
        self.write(name, weight)
        self.write(name + SCALE, scale)

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
    quantization: str | None = None,
    overwrite: bool = True,
) -> None:
    """Write a state dict; the file replaces an older one only when it is complete and checked.

    `quantization` says that its large matrices are packed already. Raises `ValueError` for tensors
    that are not those of the configuration, or of several dtypes, and `OSError`.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(
            f"weights packed as {quantization} are for decoding alone; save the model before they "
            "are packed"
        )
    expected = expected_tensors(config, torch.float32, quantization)
    _check_names(tensors, expected, "the state dict")
    plain = [
        name for name in expected_shapes(config) if packed_precision(name, quantization) is None
    ]
    dtypes = {tensors[name].dtype for name in plain}
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
        quantization=quantization,
        overwrite=overwrite,
    ) as writer:
        for name in expected:
            writer.write(name, tensors[name])


def read_metadata(path: str | os.PathLike[str]) -> CheckpointMetadata:
    """Read and check everything but the weights.

    Raises `OSError` where there is no file to read, and `ValueError` where it is damaged, hostile,
    not one of ours, or of a later version.
    """
    header, data_start, size = read_header(Path(path))
    try:
        custom = _check_custom(header.pop("__metadata__", None), header)
        tensors = check_entries(header, data_start, size)
        config = GPT2MLConfig.from_dict(_parse_object(custom["config"], "config"))
        vocab = custom.get("vocab")
        _check_vocab(vocab, config)
        quantization = custom.get("quantization")
        _check_tensors(tensors, config, quantization)
        return CheckpointMetadata(
            config=config,
            vocab=vocab,
            source=_parse_object(custom.get("source", "{}"), "source"),
            generation=_parse_object(custom.get("generation", "{}"), "generation"),
            quantization=quantization,
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


def load_optimizer_slots(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The optimizer's statistics by name, without `optimizer.`; none in files of this version."""
    return {}


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu" or dtype.is_floating_point:
        return torch.empty(shape, dtype=dtype, device=device)
    return packing.empty_in_huge_pages(shape, dtype)


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
    dtype = _float_dtype(tensors, config, quantization)
    expected = expected_tensors(config, dtype, quantization)
    _check_names(tensors, expected, "the file")
    for name, (wanted, shape) in expected.items():
        info = tensors[name]
        if info.shape != tuple(shape):
            raise ValueError(
                f"tensor {name!r} has shape {info.shape}; the configuration says {tuple(shape)}"
            )
        if info.dtype != wanted:
            raise ValueError(
                f"tensor {name!r} is {_names([info.dtype])}; expected {_names([wanted])}"
            )


def _float_dtype(
    tensors: Mapping[str, TensorInfo], config: GPT2MLConfig, quantization: str | None
) -> torch.dtype:
    """The one dtype of the weights that are not packed."""
    plain = [
        name for name in expected_shapes(config) if packed_precision(name, quantization) is None
    ]
    dtypes = {tensors[name].dtype for name in plain if name in tensors}
    if len(dtypes) > 1 or not dtypes <= set(_WEIGHT_DTYPES):
        raise ValueError(f"weights of {_names(dtypes)}; expected one of {_names(_WEIGHT_DTYPES)}")
    return dtypes.pop() if dtypes else torch.float32


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
