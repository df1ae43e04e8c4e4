"""Fixtures of the tests with transformers: the shipped model as an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpt2ml_torch import GPT2ML, Tokenizer
from gpt2ml_torch.export.folder import export_folder

transformers = pytest.importorskip("transformers", reason="transformers (extra [hf]) is missing")


@pytest.fixture(scope="session")
def exported(shipped_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, exported with its code; don't write into it."""
    return export_folder(shipped_model, tmp_path_factory.mktemp("exported") / "demo")


@pytest.fixture(scope="session")
def ours(shipped_model: Path) -> GPT2ML:
    return GPT2ML.from_pretrained(shipped_model)


@pytest.fixture(scope="session")
def our_tokenizer(shipped_model: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(shipped_model)


@pytest.fixture
def model(exported: Path) -> Any:
    """The exported model, loaded by transformers with the folder's own code."""
    return transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)


@pytest.fixture(scope="session")
def tokenizer(exported: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(exported)
