"""What the machine is, and how fast it reads memory: the yardstick beside every figure."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def describe() -> dict[str, str | int | float]:
    """Hardware, versions and date, for the head of a table."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(
        line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line
    )
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile"} & set(
        fields.get("flags", "").split()
    )
    return f"{fields.get('model name', platform.machine())} ({', '.join(sorted(flags))})"


def read_bandwidth(device: str = "cpu", *, repeats: int = 7) -> float:
    """Bytes per second that all cores (or the GPU) read, the median of several passes.

    A sum over far more memory than the caches hold. On the CPU through the project's own kernels'
    access pattern this is what a decoding step could reach, not the vendor's figure.
    """
    size = 1 << 30 if device == "cpu" else 8 << 30
    data = torch.ones(size // 8, dtype=torch.int64, device=device)
    seconds = []
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        data.sum()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return size / statistics.median(seconds)


def seconds_of(work: Callable[[], object]) -> float:
    """How long it takes, once."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
