"""Writing the one file (`gpt2ml_torch.modelfile.reader` says what is in it and reads it).

PyTorch is imported only where a tensor is written: the converter writes bytes, and is done before
PyTorch would have started.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.modelfile.format import (
    QUANTIZATIONS,
    SCALE,
    WEIGHT_DTYPES,
    expected_slots,
    expected_tensors,
    packed_precision,
    plain_weights,
)
from gpt2ml_torch.modelfile.safetensors_writer import SafetensorsWriter, dtype_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT_VERSION = 1

_RESERVE = 2 << 10  # bytes of the header kept free for `CheckpointWriter.set_source`


class CheckpointWriter(SafetensorsWriter):
    """Writes the one file tensor by tensor: `with CheckpointWriter(...) as w: w.write_weight(name,
    tensor)`.

    Every weight of `expected_shapes(config)` must be written, in `dtype`; with a `quantization` the
    large ones are packed on the way; with `slots` so must be the optimizer's statistics
    (`layout.slot_shapes`). Raises as `SafetensorsWriter` does.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: GPT2MLConfig,
        *,
        dtype: torch.dtype | str,
        vocab: str | None = None,
        source: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        quantization: str | None = None,
        slots: bool = False,
        overwrite: bool = False,
    ) -> None:
        if quantization not in (None, *QUANTIZATIONS):
            raise ValueError(
                f"quantization is {quantization!r}; expected one of {', '.join(QUANTIZATIONS)}"
            )
        dtype = dtype_name(dtype)
        if dtype not in WEIGHT_DTYPES:
            raise ValueError(f"weights of {dtype}; expected one of {', '.join(WEIGHT_DTYPES)}")
        check_vocab(vocab, config)
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
        specs = expected_tensors(config, dtype, quantization)
        if slots:
            specs.update(expected_slots(config))
        super().__init__(path, specs, self._custom, overwrite=overwrite, reserve=_RESERVE)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one declared tensor; from any device, contiguous or not."""
        import torch

        spec = self._specs.get(name)
        found = dtype_name(tensor.dtype), tuple(tensor.shape)
        if spec is not None and found != (spec[0], tuple(spec[1])):
            raise ValueError(
                f"tensor {name!r} is {found[0]} of shape {found[1]}; "
                f"expected {spec[0]} of shape {tuple(spec[1])}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.write_pieces(name, [flat.numpy()])

    def write_weight(self, name: str, tensor: Tensor) -> None:
        """Write one weight, floating point as the model has it, packed where the file packs it."""
        precision = packed_precision(name, self._quantization)
        if precision is None:
            return self.write(name, tensor)
        from gpt2ml_torch import kernels  # brings PyTorch, a second to import

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
    expected = expected_tensors(config, "float32", quantization)
    check_names(tensors, expected, "the state dict")
    dtypes = {tensors[name].dtype for name in plain_weights(config, quantization)}
    if len(dtypes) > 1:
        raise ValueError(
            f"weights of several dtypes, {', '.join(sorted(map(dtype_name, dtypes)))}; convert the "
            "model to one first"
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


def check_names(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` unless the names are the expected ones, telling the first few others."""
    faults = []
    for what, names in (
        ("lacks", set(expected) - set(found)),
        ("has unknown", set(found) - set(expected)),
    ):
        if names:
            shown = ", ".join(repr(name[:80]) for name in sorted(names)[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            faults.append(f"{where} {what} {shown}{more}")
    if faults:
        raise ValueError(f"not the weights of this configuration: {'; '.join(faults)}")


def check_vocab(vocab: str | None, config: GPT2MLConfig) -> None:
    """Raise `ValueError` for a vocabulary that can't be this model's."""
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


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
