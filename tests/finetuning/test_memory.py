"""Memory foretold: its kinds, what would save some, and whether it comes true."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2ml_torch import GPT2ML, GPT2MLConfig
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.finetuning import FinetuneConfig, predict
from gpt2ml_torch.finetuning.memory import parse_size, suggestion
from gpt2ml_torch.modelfile.writer import save
from tests.helpers.finetuning_runs import SPECIAL, python, settings


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
    assert suggestion(config, light.total, sizes) == (
        "that does not fit; it would with the step inside the backward pass (no --keep-gradients): "
        f"{light.total / 2**30:.2f} GiB"
    )
    assert "no setting here would" in suggestion(config, 1000, sizes)


def test_a_dry_run_for_a_gpu_needs_none(
    tuning_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    words = ["finetune", str(tuning_files / "model.safetensors"), str(tuning_files / "text.txt")]
    words += ["--out", str(out), "--device", "cuda", "--precision", "bfloat16"]
    assert main([*words, "--dry-run", "--memory", "22GB"]) == 0
    assert capsys.readouterr().out.endswith("that fits\n")
    assert main([*words, "--dry-run", "--memory", "1MB"]) == 1
    if not torch.cuda.is_available():
        assert main(words) == 2
        assert "GPU" in capsys.readouterr().err


def test_a_suggestion_takes_the_fewest_changes_that_fit() -> None:
    sizes = GPT2MLConfig(
        vocab_size=500,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=256,
    )
    config = FinetuneConfig(
        model="m", data=("d",), out="o.safetensors", precision="float32", batch_size=4
    )
    budget, names, previous = predict(config, sizes).total, [], config
    for name, change in (
        ("--batch-size 1", {"batch_size": 1}),
        ("--precision bfloat16", {"precision": "bfloat16"}),
        ("--lora-rank 16", {"lora_rank": 16}),
        ("--lora-base int8", {"lora_base": "int8"}),
    ):
        previous = dataclasses.replace(previous, **change)
        before, budget = budget, predict(previous, sizes).total
        assert budget < before
        names.append(name)
        expected = f"it would with {', '.join(names)}: {budget / 2**30:.2f} GiB"
        assert suggestion(config, budget, sizes) == f"that does not fit; {expected}"


@pytest.mark.parametrize(
    "changes",
    [{}, {"step_in_backward": False, "optimizer": "adamw"}],
    ids=["adafactor in backward", "adamw, gradients kept"],
)
def test_a_real_run_takes_what_was_predicted(changes: dict[str, Any], tmp_path: Path) -> None:
    """The whole process's largest resident set, within 15 %."""
    config = GPT2MLConfig(
        vocab_size=2000,
        hidden_size=768,
        num_hidden_layers=5,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=128,
    )
    vocab = [*SPECIAL, *(chr(0x4E00 + index) for index in range(1900))]
    model = tmp_path / "model.safetensors"
    weights = GPT2ML(config).state_dict()
    save(model, weights, config, vocab="\n".join(vocab) + "\n")
    (tmp_path / "text.txt").write_text("".join(vocab[5:300]), encoding="utf-8")
    values = settings(tmp_path, tmp_path / "out.safetensors", valid_share=0.0, **changes)
    values |= {"precision": "float32", "batch_size": 2, "steps": 2}
    ended = python("tests.helpers.finetuning_worker", "memory", json.dumps(values))
    assert ended.returncode == 0, ended.stderr
    foretold = predict(FinetuneConfig(**values | {"data": tuple(values["data"])}))
    assert foretold.total == pytest.approx(int(ended.stdout), rel=0.15)


@pytest.mark.parametrize("text", ["22GB", "24 GiB", "800MB", "1.5G"])
def test_sizes_are_read(text: str) -> None:
    expected = {"22GB": 22e9, "24 GiB": 24 * 2**30, "800MB": 8e8, "1.5G": 1.5e9}[text]
    assert parse_size(text) == expected
