"""The threads that OpenMP keeps are given back on request, and started again when needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, torch
from gpt2ml_torch.openmp import release_threads

def count():
    return len(os.listdir("/proc/self/task"))

a = torch.randn(300, 300, dtype=torch.float64)
torch.exp(a)
before, first = count(), torch.exp(a)
release_threads()
after, again = count(), torch.exp(a)
print(before, after, count(), torch.get_num_threads(), bool((first == again).all()))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc to count threads in")
def test_idle_threads_end_and_the_next_computation_starts_them_again() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    words = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    before, after, again, threads = map(int, words[:4])
    assert after == before - (threads - 1)
    assert again == before
    assert words[4] == "True"
    if threads == 1:
        pytest.skip("one processor: there are no threads to end")
