"""The yardstick for decoding is one, and plausible."""

from __future__ import annotations

import time

import torch

from gpt2ml_torch import bandwidth
from gpt2ml_torch.checking import machine as check
from gpt2ml_torch.commands import generate
from scripts.benchmarks import assistant, generation, gpu


def test_memory_is_read_neither_slower_than_python_nor_faster_than_any_machine_can() -> None:
    data = torch.ones(1 << 27, dtype=torch.uint8)
    started = time.perf_counter()
    sum(bytes(data[: 1 << 20].numpy()))
    of_python = (1 << 20) / (time.perf_counter() - started)
    assert of_python < bandwidth.read_bandwidth("cpu") < 1e14


def test_stats_check_and_the_tables_use_one_yardstick() -> None:
    for user in (check, generate, generation, gpu, assistant):
        assert user.read_bandwidth is bandwidth.read_bandwidth
