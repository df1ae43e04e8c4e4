"""The threads that OpenMP keeps for each thread that has computed."""

from __future__ import annotations

import contextlib
import ctypes
import os

_HARD = 2  # omp_pause_hard: the next parallel region starts threads again


def release_threads() -> None:
    """End the OpenMP threads that wait for the calling thread's next computation.

    Call it before another thread takes over the computing. GNU's OpenMP lets threads wait actively
    only while all of them, idle ones too, are no more than the processors; beyond, each of a step's
    hundreds of parallel regions wakes threads that sleep, and decoding one text on two cores takes
    1.4 times as long. Does nothing where another OpenMP is loaded, or none.
    """
    no_load = getattr(os, "RTLD_NOLOAD", None)
    if no_load is None:
        return
    with contextlib.suppress(OSError, AttributeError):  # not loaded; older than OpenMP 5.0
        ctypes.CDLL("libgomp.so.1", mode=no_load).omp_pause_resource_all(_HARD)
