"""The attacks run, find nothing in a moment, and do find what is there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from gpt2ml_torch.modelfile import ModelFile
from scripts.attacks import NAMES, model_file
from scripts.attacks.__main__ import run_slice

QUICK = ("model_file", "metadata", "snappy", "protocol_buffers", "pickles", "flags")


@pytest.mark.parametrize("name", QUICK)
def test_an_attack_runs_cases_and_finds_nothing(name: str) -> None:
    cases, findings = run_slice(name, seed=1, first=0, seconds=0.5)
    assert cases > 0
    assert findings == []


def test_every_attack_is_listed() -> None:
    folder = Path(model_file.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - {
        "__init__",
        "__main__",
        "tools",
        "worker",
    }
    assert modules == set(NAMES)


def test_a_reader_that_verifies_nothing_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = model_file.Attack(tmp_path)
    monkeypatch.setattr(ModelFile, "verify", lambda file: None)

    def many() -> None:
        for case in range(500):
            attack(random.Random(case))

    with pytest.raises(AssertionError, match="differs without a word"):
        many()
