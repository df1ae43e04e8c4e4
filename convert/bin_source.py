"""The community's PyTorch conversion, `pytorch_model.bin`, as a source."""

from __future__ import annotations

import pickle
import re
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert import mapping
from convert.sources import Array, Entries
from gpt2ml_torch.modelfile.format import dtype_name

# Bytes of the mapped file that may be resident: pages that were read stay until it is unmapped.
_RELEASE_EVERY = 96 << 20

# What PyTorch's errors say beside what is wrong, the advice to load the file all the same included.
_ADVICE = re.compile(
    r"^Weights only load failed.*?\n\s*\n|^Check the documentation.*|This is an internal miniz.*",
    re.DOTALL | re.MULTILINE,
)


class BinSource:
    """A pickled state dict: memory-mapped, unpickled by the restricted loader, which runs nothing.

    Raises `ValueError` for a file that isn't a state dict, or that would run code.
    """

    format: mapping.Format = "bin"

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.data_files = [path]
        self._path = path
        self._tensors = self._load()
        self._resident = 0
        self._lock = threading.Lock()
        self.entries: Entries = {
            name: (dtype_name(value.dtype), tuple(value.shape)) if _is_plain(value) else (None, ())
            for name, value in self._tensors.items()
        }

    def read(self, name: str) -> Array:
        with self._lock:
            if self._resident > _RELEASE_EVERY and self._mapped:
                self._tensors = self._load()
                self._resident = 0
            tensor = self._tensors[name].detach().resolve_neg()
            self._resident += tensor.nbytes
        array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return array

    def step(self) -> int | None:
        return None

    def check(self) -> None:
        """The tied output layer, where it is stored, must be the embedding: the file has no room
        for another."""
        if mapping.BIN_TIED not in self._tensors:
            return
        tied, embedding = self._tensors[mapping.BIN_TIED], self._tensors.get("wte.weight")
        if not isinstance(embedding, Tensor) or not isinstance(tied, Tensor):
            return
        if tied.data_ptr() != embedding.data_ptr() and not _identical(tied, embedding):
            raise ValueError(
                f"{self._path}: {mapping.BIN_TIED} differs from wte.weight; in GPT2_ML they are "
                "one tensor"
            )
        self._resident += 2 * embedding.nbytes

    def _load(self) -> dict[str, Any]:
        with self._path.open("rb"):
            pass  # if it can't be opened, that is what is wrong
        try:
            loaded = self._unpickle()
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{self._path} is no plain state dict, or hostile: {_reason(error)}; "
                "nothing was run"
            ) from None
        except Exception as error:  # a damaged zip or pickle surfaces as almost any exception
            raise ValueError(
                f"{self._path} is damaged or truncated: {_reason(error)}; fetch it again"
            ) from None
        if not isinstance(loaded, Mapping) or not all(isinstance(key, str) for key in loaded):
            raise ValueError(f"{self._path} holds {type(loaded).__name__}; expected a state dict")
        return _without_prefix(loaded, self._path)

    def _unpickle(self) -> Any:
        if zipfile.is_zipfile(self._path):
            with zipfile.ZipFile(self._path) as archive:
                inflated = sum(member.file_size for member in archive.infolist())
            if inflated > self._path.stat().st_size:  # PyTorch compresses nothing
                raise RuntimeError(f"it would inflate to {inflated:,} bytes")
        try:
            loaded = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
            self._mapped = True
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # PyTorch's format before 1.6 can't be mapped; it is as restricted, but takes memory.
            loaded = torch.load(self._path, map_location="cpu", weights_only=True)
            self._mapped = False
        return loaded


def _without_prefix(loaded: Mapping[str, Any], path: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in loaded.items():
        short = key.removeprefix(mapping.BIN_PREFIX)
        if short in result:
            raise ValueError(f"{path} has {short!r} twice, with and without {mapping.BIN_PREFIX!r}")
        result[short] = value
    return result


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with its numbers in memory, one beside the other."""
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and not value.is_quantized
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def _identical(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _reason(error: BaseException) -> str:
    """What is wrong, in a line."""
    text = next(iter(_ADVICE.sub("", str(error)).strip().splitlines()), "")
    if not text or not isinstance(error, RuntimeError | pickle.UnpicklingError):
        text = f"{type(error).__name__}: {text}"
    return text.rstrip(".: ")[:200]
