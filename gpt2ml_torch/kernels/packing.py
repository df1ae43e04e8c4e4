"""Pack and unpack weights of 32 to 4 bits in the layout that `linear.cpp` reads.

Rows come in panels of 16, so that one vector holds one step of 16 outputs. Integers are symmetric
with one scale for each row and group of inputs: 128 inputs at 8 bits, 32 at 4. Scales are bfloat16
and are rounded before the values, so that their rounding costs nothing.

Shapes:
    N  outputs, padded to a multiple of 16      K  inputs, padded to a multiple of 32
    P  panels, N / 16                           G  groups of inputs
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2ml_torch.precision import INTEGER, MULTIPLE, PANEL, Precision

GROUP = {precision.bits: precision.group for precision in INTEGER if precision.group}
LARGEST = {8: 127, 4: 7}  # of a value; the smallest is -LARGEST at 8 bits and -LARGEST - 1 at 4
OFFSET = {8: 128, 4: 8}  # values are stored unsigned

_HUGE_PAGE = 2 << 20
_MADV_PAGEOUT = 21


def storage_dtype(precision: Precision) -> torch.dtype:
    """The dtype of a packed weight's memory."""
    return torch.uint8 if precision.is_integer else precision.dtype


def empty_packed(outputs: int, inputs: int, precision: Precision) -> tuple[Tensor, Tensor | None]:
    """Memory for a packed weight and its scale, in huge pages where the system has them.

    With 4 KiB pages, address translation alone can cost a quarter of the read bandwidth.
    """
    shapes = precision.packed_shapes(outputs, inputs)
    weight = empty_in_huge_pages(shapes.weight, storage_dtype(precision))
    scale = None if shapes.scale is None else torch.empty(shapes.scale, dtype=torch.bfloat16)
    return weight, scale


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the CPU, in huge pages if it is large enough for one."""
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    size = tensor.nbytes
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    # Private: shared memory gets huge pages under another setting, which is mostly off.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def release_pages(tensor: Tensor) -> None:
    """Take the pages of a memory-mapped tensor out of this process's memory, where Linux can.

    They are read from the file again when they are used again, so nothing is lost.
    """
    if sys.platform == "linux":
        page = mmap.PAGESIZE
        start = -(-tensor.data_ptr() // page) * page
        size = (tensor.data_ptr() + tensor.nbytes) // page * page - start
        if size > 0:
            arguments = ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_PAGEOUT
            ctypes.CDLL(None).madvise(*arguments)


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, where Linux says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) << 10


@torch.no_grad()
def pack_rows(rows: Tensor, weight: Tensor, scale: Tensor | None, bits: int) -> None:
    """Round rows, (n, K) floating, into their panels; the last panel is filled up with zeros."""
    rows = F.pad(rows, (0, -rows.shape[1] % MULTIPLE, 0, -len(rows) % PANEL))
    if scale is None:
        steps = rows.unflatten(0, (-1, PANEL)).unflatten(2, (-1, weight.shape[-1]))
        weight.copy_(steps.transpose(1, 2))
    else:
        values, row_scale = quantize(rows.float(), bits)
        weight.copy_(_pack_values(values, bits))
        scale.copy_(row_scale.unflatten(0, (-1, PANEL)).transpose(1, 2))


def quantize(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Nearest values and their scales: (N, K) -> int8 (N, K) and bfloat16 (N, G)."""
    grouped = _group(rows, bits)  # (N, G, group)
    scale = (grouped.abs().amax(2) / LARGEST[bits]).bfloat16()
    if bits == 4:
        scale = _refine(grouped, scale)
    return _round(grouped, scale, bits).flatten(1)[:, : rows.shape[1]].to(torch.int8), scale


def _group(rows: Tensor, bits: int) -> Tensor:
    return F.pad(rows, (0, -rows.shape[1] % GROUP[bits])).unflatten(1, (-1, GROUP[bits]))


def _round(grouped: Tensor, scale: Tensor, bits: int) -> Tensor:
    inverse = torch.where(scale == 0, 0, 1 / scale.float())[:, :, None]
    return (grouped * inverse).round_().clamp_(-LARGEST[bits] - (bits == 4), LARGEST[bits])


def _refine(grouped: Tensor, widest: Tensor) -> Tensor:
    """Of a few scales, either sign, the one with the least squared error in each group.

    A negative scale lets the group's largest weight, if positive, use the value -8.
    """
    best, least = widest, torch.full_like(widest, torch.inf, dtype=torch.float32)
    for ratio in (1.0, 0.95, 0.875, -0.95, -0.875, -0.8):
        scale = (widest.float() * ratio).bfloat16()
        rounded = _round(grouped, scale, 4).mul_(scale.float()[:, :, None])
        error = rounded.sub_(grouped).square_().sum(2)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _pack_values(values: Tensor, bits: int) -> Tensor:
    unsigned = (values.to(torch.int16) + OFFSET[bits]).to(torch.uint8).unflatten(0, (-1, PANEL))
    if bits == 8:
        return unsigned.unflatten(2, (-1, 4)).transpose(1, 2)  # (P, K/4, 16, 4)
    low, high = unsigned.unflatten(2, (-1, 2, 4)).unbind(3)  # each (P, 16, K/8, 4)
    return (low | (high << 4)).transpose(1, 2)


def unpack(weight: Tensor, scale: Tensor | None, bits: int, outputs: int, inputs: int) -> Tensor:
    """The weight that a packed one stands for, float32 (N, K)."""
    if scale is None:
        return weight.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs, :inputs].float()
    return dequantize(weight.transpose(1, 2), scale.transpose(1, 2), bits).flatten(0, 1)[
        :outputs, :inputs
    ]


def dequantize(steps: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Rows' stored steps, (..., K * bits / 32, 4), and scales, (..., G) -> float32 (..., K)."""
    if bits == 4:
        steps = torch.stack((steps & 15, steps >> 4), dim=-2).flatten(-3, -2)
    values = steps.flatten(-2).float() - OFFSET[bits]  # (..., K)
    scales = scale.float().repeat_interleave(GROUP[bits], dim=-1)
    return values * scales[..., : values.shape[-1]]
