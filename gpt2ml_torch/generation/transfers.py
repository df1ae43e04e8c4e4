"""Copies between the host and a GPU that neither side waits for.

`torch.tensor(values, device="cuda")` and `tensor.tolist()` wait for everything that the GPU was
given to do. These copies go through page-locked memory, in their turn among the GPU's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(
    values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """A tensor of these numbers, which may be nested, on a device."""
    pinned = device.type == "cuda"
    tensor = torch.tensor(values, dtype=dtype, pin_memory=pinned)
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A tensor's values on their way to the host: the copy starts here, `tolist` waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list[Any]:
        """The values; waits for this copy, not for work that was queued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[Any] = self._copy.tolist()
        return values
