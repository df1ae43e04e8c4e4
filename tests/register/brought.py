"""Small checkpoints for the register, in any form, and what a conversion must make of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.__main__ import main
from convert.tensorflow import Variable, write_checkpoint
from gpt2ml_torch.modelfile import ModelFile
from tests.helpers import checkpoint_factory as factory

WEIGHTS = factory.tf_weights()
EXPECTED = factory.expected_tensors(WEIGHTS)
MAC = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100) + b"\xff\xfe"


def write_tensorflow(folder: Path, tensors: Mapping[str, Any], name: str = "model.ckpt-70") -> Path:
    """A TensorFlow checkpoint with its configuration and vocabulary, without TensorFlow."""
    factory.write_beside(folder)
    variables = {key: Variable.of(value) for key, value in tensors.items()}
    write_checkpoint(folder / name, variables)
    return folder / name


def community(prefix: str = "transformer.") -> dict[str, torch.Tensor]:
    """The community's state dict, each tensor in memory of its own."""
    state = factory.community_state_dict(WEIGHTS, prefix=prefix)
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_converts(source: Path | str, capfd: pytest.CaptureFixture[str]) -> str:
    """Convert; the weights must be the factory's, bit for bit. Returns the summary."""
    out = Path(source).parent / "converted.out"
    status = main([str(source), str(out), "--force"])
    said, error = capfd.readouterr()
    assert (status, error) == (0, "")
    with ModelFile.open(out) as file:
        found = file.state_dict()
    assert found.keys() == EXPECTED.keys()
    assert all(torch.equal(found[name], EXPECTED[name]) for name in EXPECTED)
    return said


def refused(source: Path | str, capfd: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line with which a conversion refuses; it leaves nothing behind."""
    out = Path(source).parent / "refused.out"
    assert main([str(source), str(out), *options]) == 2
    said, error = capfd.readouterr()
    assert said == ""
    assert error.count("\n") == 1
    assert not out.exists()
    return error
