"""Adapters: saved as peft does, merged, and trained over a packed base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpt2ml_torch import GPT2ML
from gpt2ml_torch.__main__ import main
from tests.finetuning_runs import run


def test_lora_is_saved_as_peft_does_and_merges(tuning_files: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = str(tuning_files / "model.safetensors")
    result = run(tuning_files, tmp_path / "adapter", lora_rank=4, precision="float32", dropout=0.0)
    assert result.adapter == tmp_path / "adapter"
    merged = tmp_path / "merged.safetensors"
    assert main(["merge", model, str(tmp_path / "adapter"), "--out", str(merged)]) == 0
    ids = torch.arange(5, 25)[None]
    adapted = peft.PeftModel.from_pretrained(GPT2ML.from_pretrained(model), tmp_path / "adapter")
    found = GPT2ML.from_pretrained(merged)(ids)
    torch.testing.assert_close(found, adapted.get_base_model().eval()(ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, GPT2ML.from_pretrained(model)(ids), atol=1e-2)
