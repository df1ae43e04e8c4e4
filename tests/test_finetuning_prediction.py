"""Memory foretold: its kinds, what would save some, and whether it comes true."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gpt2ml_torch import GPT2MLConfig
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.finetuning import FinetuneConfig, predict
from gpt2ml_torch.finetuning.prediction import suggestion
from tests.finetuning_runs import settings


def test_a_dry_run_names_the_kinds_and_suggests_what_would_fit(
    tuning_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    words = [
        str(tuning_files / "model.safetensors"),
        str(tuning_files / "text.txt"),
        "--out",
        str(out),
    ]
    assert main(["finetune", *words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for kind in ("weights", "gradients", "optimizer", "activations", "total"):
        assert kind in shown
    assert not out.with_suffix(".run").exists()
    sizes = GPT2MLConfig(
        vocab_size=1000,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=64,
    )
    large = {"optimizer": "adamw", "step_in_backward": False, "precision": "float32"}
    config = FinetuneConfig(**settings(tuning_files, out, **large))
    heavy = predict(config, sizes)
    assert heavy.weights == 4 * sizes.num_parameters
    assert 8 * sizes.num_parameters < heavy.optimizer < 8 * sizes.num_parameters + 2**24
    light = predict(dataclasses.replace(config, step_in_backward=True), sizes)
    assert light.gradients < heavy.gradients / 4
    assert "inside the backward pass" in suggestion(config, light.total, sizes)
    assert "no setting here would" in suggestion(config, 1000, sizes)
