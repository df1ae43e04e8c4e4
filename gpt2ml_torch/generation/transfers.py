"""Asynchronous copies between the host and a GPU.

`torch.tensor(values, device="cuda")` and `tensor.tolist()` wait for all work queued on the GPU.
These copies go through page-locked memory and are queued like the GPU's other work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(
    values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """A tensor of these numbers or nested sequences of numbers on `device`, without waiting."""
    pinned = device.type == "cuda"
    tensor = torch.tensor(values, dtype=dtype, pin_memory=pinned)
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor to the host: construction starts it, `tolist` waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list[Any]:
        """The values as nested lists; waits for this copy, not for work queued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[Any] = self._copy.tolist()
        return values
