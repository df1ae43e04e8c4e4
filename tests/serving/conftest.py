"""Fixtures of the serving tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2ml_torch import Generator, kernels
from tests.helpers.adapters import write_adapter
from tests.helpers.server import ServerProcess, serving


@pytest.fixture(scope="module")
def generator(shipped_model: Path) -> Generator:
    """The shipped model in int8 on the kernels, where there are any."""
    return Generator.from_pretrained(shipped_model, batch_size=4)


@pytest.fixture(scope="session")
def server(shipped_model: Path) -> Iterator[ServerProcess]:
    """A server that many tests share."""
    with serving(
        shipped_model, "--name", "demo", "--max-rows", "4", "--max-queue", "200"
    ) as started:
        yield started


@pytest.fixture(scope="session")
def adapter_folders(
    shipped_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Adapters of the shipped model, of different ranks."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(shipped_model, folder / name, seed=seed, rank=seed)
        for name, seed in (("poems", 3), ("news", 17))
    }


@pytest.fixture(scope="session")
def adapted_server(
    shipped_model: Path, adapter_folders: dict[str, Path]
) -> Iterator[ServerProcess]:
    """A server of the shipped model, these adapters and a draft model."""
    if not kernels.load_kernels():
        pytest.skip("no compiler or no AVX2")
    options = [f"--adapter={name}={folder}" for name, folder in adapter_folders.items()]
    with serving(shipped_model, "--name", "demo", "--assistant", "int4", *options) as started:
        yield started
