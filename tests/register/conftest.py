"""What the register's tests share: a tiny model's file, and commands run in this process."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from convert.__main__ import main as convert
from gpt2ml_torch.__main__ import main
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.kernels.test_build import compiler as compiler


class Ran(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def is_one_line(self) -> bool:
        """Whether it is an error of one short line, with nothing on standard output."""
        told = self.err.count("\n") == 1 and len(self.err) < 1000 and ": error: " in self.err
        return (self.status, self.out) == (2, "") and told and self.err[:-1].isprintable()


class Run:
    """`run("info", path)` runs `gpt2ml info path`; `run.convert(...)` is `python -m convert`."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object) -> Ran:
        self._capsys.readouterr()
        return Ran(main([str(word) for word in words]), *self._capsys.readouterr())

    def convert(self, *words: object) -> Ran:
        self._capsys.readouterr()
        return Ran(convert([str(word) for word in words]), *self._capsys.readouterr())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file with its vocabulary; don't write into its folder."""
    path = tmp_path_factory.mktemp("register") / "tiny.safetensors"
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(path, tokenizer=tokenizer)
    return path
