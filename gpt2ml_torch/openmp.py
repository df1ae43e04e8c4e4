"""Release the pool of worker threads that OpenMP keeps for each thread that has computed."""

from __future__ import annotations

import contextlib
import ctypes
import os

_HARD = 2  # omp_pause_hard: threads end, and the next parallel region starts new ones


def release_threads() -> None:
    """End the OpenMP worker threads of the calling thread.

    Call it before another thread takes over the computation. GNU OpenMP lets idle threads spin only
    while all threads together, idle ones included, are no more than the processors. Beyond that
    they sleep, and each of a step's hundreds of parallel regions must wake them: decoding one text
    on two cores then takes 1.4 times as long. Does nothing if no OpenMP, or another one, is loaded.
    """
    no_load = getattr(os, "RTLD_NOLOAD", None)
    if no_load is None:
        return
    # OSError: not loaded. AttributeError: older than OpenMP 5.0.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libgomp.so.1", mode=no_load).omp_pause_resource_all(_HARD)
