"""The attacks run, find nothing in a moment, and do find what is there."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from gpt2ml_torch.modelfile import ModelFile
from scripts.attacks import NAMES, model_file
from scripts.attacks import __main__ as attacks
from scripts.attacks.__main__ import run_slice

QUICK = ("model_file", "metadata", "snappy", "protocol_buffers", "pickles", "flags", "brought",
         "training_files")  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_an_attack_runs_cases_and_finds_nothing(name: str) -> None:
    cases, findings = run_slice(name, seed=1, first=0, seconds=0.5)
    assert cases > 0
    assert findings == []


@pytest.mark.parametrize("seconds", [1, 60, 120, 600, 1300])
@pytest.mark.parametrize("late", [0.0, 4.0])
def test_the_last_attack_has_as_much_time_as_the_first(
    seconds: int, late: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    given: dict[str, list[float]] = {}

    def slice_(name: str, seed: int, first: int, share: float) -> tuple[int, list[str]]:
        given.setdefault(name, []).append(share)
        clock[0] += share + late * (len(given) == 1)  # the first one ends late
        return 1, []

    monkeypatch.setattr(attacks.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(attacks, "run_slice", slice_)
    monkeypatch.setattr(sys, "argv", ["attack", "--seconds", str(seconds)])
    assert attacks.main() == 0
    assert list(given) == list(NAMES)
    assert len({len(shares) for shares in given.values()}) == 1
    assert max(sum(shares) for shares in given.values()) <= 1.2 * sum(given[NAMES[-1]]) + late
    assert clock[0] <= seconds + len(NAMES) * attacks.LEAST_SECONDS + late


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
