"""What quantize="auto" takes on a device, and that the log says so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from gpt2ml_torch import GPT2ML
from gpt2ml_torch.modelfile.pretrained import fastest
from gpt2ml_torch.modelfile.reader import ModelFile
from tests.helpers.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("packed", [None, "int8", "int4"])
def test_on_a_gpu_a_file_keeps_its_weights_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, packed: str | None
) -> None:
    path = tmp_path / "model.safetensors"
    tiny_model(tiny_tokenizer()).save_pretrained(path)
    if packed is not None:
        GPT2ML.from_pretrained(path, quantize=packed).save_pretrained(path)
    with ModelFile.open(path) as file, caplog.at_level(logging.INFO):
        assert fastest(file, device=torch.device("cuda")) == (None, torch.bfloat16)
    weights = packed or "bfloat16"
    assert f"'auto' takes {weights} weights and computes in bfloat16" in caplog.text
