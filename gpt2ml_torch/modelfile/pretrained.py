"""Load a model from a model file, and save it. There is no other loader.

`GPT2ML` inherits `from_file`, `from_pretrained` and `save_pretrained` from here, so that model.py
holds only the model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from gpt2ml_torch import kernels
from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.devices import choose_device
from gpt2ml_torch.modelfile.reader import ModelFile
from gpt2ml_torch.modelfile.writer import save
from gpt2ml_torch.precision import PACKABLE, Precision

if TYPE_CHECKING:
    from gpt2ml_torch.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)

AUTO = "auto"
SAFE = Precision.INT8  # takes half of bfloat16's time, and costs no measurable perplexity

_Model = TypeVar("_Model", bound="Pretrained")  # typing.Self, before Python 3.11


class Pretrained(nn.Module):
    """A model made from a `GPT2MLConfig` that model files can be loaded into and saved from."""

    def __init__(self, config: GPT2MLConfig) -> None:
        super().__init__()
        self.config = config
        self.generation_defaults: dict[str, Any] = {}  # for `Generator`; kept in the file
        self.packed: Precision | None = None  # of the large matrices, if they are packed
        self.memory_mapped = False  # whether the weights are pages of a file

    @property
    def quantization(self) -> str | None:
        """The name of `packed`."""
        return None if self.packed is None else self.packed.value

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        quantize: Precision | str | None = None,
    ) -> _Model:
        """Load a model file, as `from_file` does with `quantize` as its `precision`.

        Raises `OSError` if the file can't be read, and `ValueError` if it is damaged, not a model
        file, or packed in another precision.
        """
        with ModelFile.open(path) as file:
            return cls.from_file(file, device=device, dtype=dtype, precision=quantize)

    @classmethod
    def from_file(
        cls: type[_Model],
        file: ModelFile,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        precision: Precision | str | None = None,
    ) -> _Model:
        """The model in an open file, in evaluation mode; `dtype` defaults to the file's.

        On the CPU weights in the file's dtype are memory-mapped. `precision` packs the large
        matrices on the way, "bfloat16", "int8" or "int4", for fast decoding on the CPU
        (`gpt2ml_torch.kernels`); `dtype` is then the dtype of the activations. "auto" chooses both,
        as described in `fastest`. Raises `ValueError` for a damaged file, an unavailable device,
        and a file that is packed in another precision.
        """
        device = choose_device(device)
        if precision == AUTO:
            precision, dtype = fastest(file, device=device, dtype=dtype)
        wanted = None if precision is None else Precision.of(precision)
        if file.packed is not None and wanted not in (None, file.packed):
            raise ValueError(
                f"{file.path} holds {file.packed} weights, which can't become {wanted}; convert "
                "the original again, or load it without quantize"
            )
        with torch.device("meta"):
            model = cls(file.config).to(dtype or file.dtype.dtype)
        model.generation_defaults = file.generation
        model.packed = file.packed or wanted
        if model.packed is not None:
            kernels.pack_model(model, model.packed)
        if model.packed == file.packed:
            tensors = file.state_dict(device=device, dtype=dtype)
            model.load_state_dict(tensors, strict=True, assign=True)
            model.memory_mapped = device.type == "cpu" and (
                file.packed is None and dtype in (None, file.dtype.dtype)
            )
        else:
            pack_from(file, model, dtype or file.dtype.dtype)
            model.to(device)
        file.check_unchanged()
        return model.eval()

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer | None = None,
        source: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        overwrite: bool = True,
        allow_non_finite: bool = False,
    ) -> None:
        """Write a model file: weights, configuration, and the tokenizer's vocabulary if given.

        `source` says where the weights come from; `generation` holds defaults for `Generator` (the
        model's own, if None). An older file is replaced only when the new one is complete. Raises
        `OSError` if it can't be written, and `ValueError` for a weight that is NaN or infinite,
        unless `allow_non_finite`.
        """
        # Only integer weights stay packed in a file; packed floats would not make it smaller.
        keeps_packed = self.packed is None or self.packed.is_integer
        save(
            path,
            self.state_dict() if keeps_packed else kernels.PlainState(self),
            self.config,
            vocab=None if tokenizer is None else tokenizer.vocab_text,
            source=source,
            generation=self.generation_defaults if generation is None else generation,
            packed=self.packed if keeps_packed else None,
            overwrite=overwrite,
            allow_non_finite=allow_non_finite,
        )


def pack_from(file: ModelFile, model: nn.Module, dtype: torch.dtype) -> None:
    """Fill a model whose layers were packed on `meta`, unpacking only one piece at a time.

    `dtype` is the dtype of the tensors that are not packed. Raises `ValueError` for a file that is
    damaged or changes meanwhile.
    """
    for name, first, rows in file.rows():
        kernels.fill_rows(model, name, rows, first, dtype)
    file.check_unchanged()


def fastest(
    file: ModelFile, *, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[Precision | None, torch.dtype | None]:
    """The fastest safe way to generate with a file on a device: packed precision and dtype.

    On a CPU with kernels the large matrices are packed as int8, or in `dtype` if it is given;
    otherwise they stay as they are. Weights that are packed in the file stay so. Activations are
    bfloat16 by default, except on a CPU without packed weights.
    """
    on_cpu = device.type == "cpu"
    fast = not on_cpu or kernels.load_kernels()  # asked here only: kernels may have to be built
    precision = None
    if fast and on_cpu and file.packed is None:
        wanted = SAFE if dtype is None else Precision.of(dtype)
        precision = wanted if wanted in PACKABLE else None
    if fast and dtype is None:
        dtype = torch.bfloat16
    computed = str(dtype or file.dtype.dtype).removeprefix("torch.")
    weights = precision or file.packed or computed
    _logger.info("quantize='auto' takes %s weights and computes in %s", weights, computed)
    return precision, dtype


def activation_dtype(precision: Precision | str) -> torch.dtype:
    """The default dtype of the activations for weights of a precision."""
    precision = Precision.of(precision)
    return torch.bfloat16 if precision.is_integer else precision.dtype
