"""Measure memory's read bandwidth, which limits decoding: each step reads all weights."""

from __future__ import annotations

import statistics
import time

import torch

_CPU_BYTES = 1 << 29  # far larger than the caches
_GPU_BYTES = 8 << 30
_PASSES = 7


def read_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes per second that all cores together, or the GPU, can read; the median of seven sums.

    On a GPU the measurement takes at most half of the free memory.
    """
    device = torch.device(device)
    size = _CPU_BYTES
    if device.type == "cuda":
        size = min(_GPU_BYTES, torch.cuda.mem_get_info(device)[0] // 2)
    data = torch.ones(max(1, size // 8), dtype=torch.int64, device=device)
    seconds = []
    for _ in range(_PASSES):
        started = time.perf_counter()
        data.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return data.nbytes / statistics.median(seconds)
