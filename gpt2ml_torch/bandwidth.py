"""How fast memory can be read: the yardstick for decoding, which reads all weights at each step."""

from __future__ import annotations

import statistics
import time

import torch

_CPU_BYTES = 1 << 29  # far more than the caches hold
_GPU_BYTES = 8 << 30
_PASSES = 7


def read_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes per second that all cores, or the GPU, read: the median of several sums over memory.

    On a GPU the probe takes at most half of the memory that is free.
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
