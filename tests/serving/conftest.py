"""Fixtures of the serving tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2ml_torch import Generator
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
