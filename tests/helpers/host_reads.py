"""What a GPU's work would be waited for: reads of tensors by the host, counted on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators show in a dispatch mode, but in inference mode those behind `item` don't.
_METHODS = {
    Tensor.__array__,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__int__,
    Tensor.item,
    Tensor.numpy,
    Tensor.tolist,
}
_OPERATORS = {
    "_local_scalar_dense",
    "equal",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class HostReads:
    """A context that lists the reads made in it: (what read, dtype, shape)."""

    def __init__(self, on_read: Callable[[], None] = lambda: None) -> None:
        self.found: list[tuple[str, torch.dtype, torch.Size]] = []
        self._on_read = on_read
        self.in_method = False
        self._modes = (_Functions(self), _Operators(self))

    def note(self, name: str, tensor: Tensor) -> None:
        self.found.append((name, tensor.dtype, tensor.shape))
        self._on_read()

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Functions(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func not in _METHODS:
            return func(*args, **(kwargs or {}))
        self._reads.note(func.__name__, args[0])
        self._reads.in_method = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._reads.in_method = False


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        reads = name in _OPERATORS or (name in _INDEXED and _has_mask(args[1]))
        if reads and not self._reads.in_method:
            self._reads.note(name, args[0])
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    masks = (torch.bool, torch.uint8)
    return any(index is not None and index.dtype in masks for index in indices)
