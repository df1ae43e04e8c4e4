"""How fast texts were written, and how fast the memory could have been read."""

from __future__ import annotations

import dataclasses
import time

import torch

_PROBE_BYTES = 2**29
_PROBES = 5


@dataclasses.dataclass
class Stats:
    """Adds up over the calls it is handed to; each batch's first step, which may compile, is left
    out of the steps.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    steps: int = 0
    step_tokens: int = 0
    step_seconds: float = 0.0
    assistant_steps: int = 0  # of the model that guesses, in the same seconds


def read_bandwidth(device: torch.device) -> float:
    """Bytes that can be read in a second, by the best of a few sums over half a gibibyte."""
    probe = torch.ones(_PROBE_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(_PROBES):
        began = time.perf_counter()
        probe.sum().item()
        best = min(best, time.perf_counter() - began)
    return _PROBE_BYTES / best
