"""Memory of this process: what it takes, and how the C library is kept from hoarding it."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
_LARGE = 2 << 20  # bytes; the temporaries of an optimizer's step are smaller
_SPARE = 8 << 20  # bytes at the heap's end, for those temporaries


def tune_allocator() -> bool:
    """Give freed blocks of 2 MB and more back to the system at once; True if that can be.

    By default glibc raises this limit up to 32 MB as blocks are freed, and activations of changing
    sizes then leave holes in its heap. Smaller blocks are used again: memory fresh from the system
    costs an optimizer's step four times the time. For the command line and for benchmarks: it
    concerns the whole process.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        return bool(
            library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
            and library.mallopt(_M_TRIM_THRESHOLD, _SPARE)
        )
    except (OSError, AttributeError):
        return False


def used_gib(device: torch.device | str = "cpu") -> float:
    """Memory in use now: the resident set, or what PyTorch has allocated on a CUDA device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    return _status("VmRSS")


def peak_gib(device: torch.device | str = "cpu") -> float:
    """The most that was in use so far."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return _status("VmHWM")


def _status(field: str) -> float:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return int(text.split(f"{field}:")[1].split()[0]) / 2**20
