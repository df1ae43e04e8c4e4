"""Fixtures that several test files share."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.helpers.weights import Sizes, Weights, loud_weights

# TensorFlow reads this when it is first imported, which TensorBoard's writer may do before the
# converter, which silences it too, gets to.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# PyTorch's CUDA builds bring Triton, which crashes the process if TensorFlow was loaded before it.
with contextlib.suppress(ImportError):
    importlib.import_module("triton")

# A shell starts what runs in the background with Ctrl-C ignored, and so would be its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class TFCheckpoint(NamedTuple):
    """A TensorFlow checkpoint on disk, with what went into it; `prefix` lacks the file endings."""

    folder: Path
    prefix: Path
    sizes: Sizes
    weights: Weights


@pytest.fixture(scope="session")
def tf_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TFCheckpoint:
    """The published layout at odd sizes and with loud weights, written by TensorFlow's own Saver;
    don't write into it.
    """
    write_checkpoint = pytest.importorskip("tests.tf_reference").write_checkpoint  # takes seconds
    sizes = Sizes(layers=4, width=60, heads=5, mlp=141, vocab=233, positions=37)
    weights = loud_weights(sizes, seed=7)
    folder = tmp_path_factory.mktemp("checkpoint")
    return TFCheckpoint(folder, write_checkpoint(folder, sizes, weights), sizes, weights)


@pytest.fixture(scope="session")
def shipped_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that the repository ships, converted; don't write into its folder."""
    from convert.__main__ import main

    path = tmp_path_factory.mktemp("shipped") / "demo.safetensors"
    assert main([str(Path(__file__).parent.parent / "checkpoints" / "demo"), str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def tuning_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model.safetensors and a text.txt to tune it on; don't write into it."""
    from tests.helpers.finetuning_runs import make_files

    return make_files(tmp_path_factory.mktemp("finetuning"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def package_log() -> Iterator[None]:
    """The package's logger as it was, since a command run in this process sends it to stderr."""
    logger = logging.getLogger("gpt2ml_torch")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For a tiny model a second thread only costs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_tf32() -> Iterator[None]:
    """CUDA's float32 products in float32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
