"""Whole fine-tunings of a tiny model: what comes out, and what can be seen on the way."""

from __future__ import annotations

from pathlib import Path

import torch

from gpt2ml_torch import checkpoint
from gpt2ml_torch.finetuning.checkpoints import CheckpointFolder
from tests.finetuning_runs import metrics, run


def test_the_result_is_one_file_that_knows_where_it_comes_from(
    tuning_files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    result = run(tuning_files, out, end_token="[SEP]", steps=30)
    metadata = checkpoint.read_metadata(out)
    assert metadata.source["finetuned"][0]["data"] == ["text.txt"]
    assert metadata.source["name"] == "tiny"
    assert metadata.generation["eos_token_id"] == [3]
    assert metadata.dtype == torch.bfloat16
    assert metadata.vocab == checkpoint.read_metadata(tuning_files / "model.safetensors").vocab
    evaluations = [row for row in metrics(out) if row["kind"] == "eval"]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 0.5
    assert evaluations[-1]["bits_per_character"] > 0
    assert result.best_loss == min(row["loss"] for row in evaluations)
    assert CheckpointFolder(tmp_path / "out.run" / "checkpoints").steps() == [28, 30]
