"""What TensorFlow's bits depend on."""

from __future__ import annotations

import platform
from pathlib import Path

import tensorflow as tf


def made_on() -> str:
    """TensorFlow's version and the widest vector instructions it can use here."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        flags = []
    widest = next((flag for flag in ("avx512f", "avx2") if flag in flags), "other")
    return f"TensorFlow {tf.__version__}, {platform.machine()}, {widest}"
