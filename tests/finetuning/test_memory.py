"""Memory estimates: their kinds, what would save some, and whether they come true."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2ml_torch import GPT2ML, GPT2MLConfig
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.finetuning import FinetuneConfig, estimate_memory, finetune, memory
from gpt2ml_torch.finetuning.memory import cheaper_settings, parse_size
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
    heavy = estimate_memory(config, sizes)
    assert heavy.weights == 4 * sizes.num_parameters
    assert 8 * sizes.num_parameters < heavy.optimizer < 8 * sizes.num_parameters + 2**24
    light = estimate_memory(dataclasses.replace(config, step_in_backward=True), sizes)
    assert light.gradients < heavy.gradients / 4
    saved = {"step_in_backward": True}, light.total
    assert cheaper_settings(config, light.total, sizes) == saved
    assert cheaper_settings(config, 1000, sizes) is None


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
    changes: dict[str, Any] = {}
    budget, previous = estimate_memory(config, sizes).total, config
    for name, value in (
        ("batch_size", 1),
        ("precision", "bfloat16"),
        ("lora_rank", 16),
        ("lora_base", "int8"),
    ):
        changes[name] = value
        previous = dataclasses.replace(config, **changes)
        before, budget = budget, estimate_memory(previous, sizes).total
        assert budget < before
        assert cheaper_settings(config, budget, sizes) == (changes, budget)


def test_a_dry_run_names_the_options_that_would_make_it_fit(
    tuning_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", str(tuning_files / "model.safetensors"), str(tuning_files / "text.txt")]
    words += ["--out", str(tmp_path / "out.safetensors"), "--dry-run"]
    words += ["--optimizer", "adamw", "--keep-gradients", "--batch-size", "400"]
    values = settings(tuning_files, tmp_path / "out.safetensors", batch_size=1)
    enough = estimate_memory(FinetuneConfig(**values)).total
    assert main([*words, "--memory", f"{enough // 1024 + 1}KiB"]) == 1
    shown = capsys.readouterr().out.splitlines()[-1]
    changes = "no --keep-gradients, --optimizer adafactor, --batch-size 1"
    assert shown.startswith(f"that does not fit; it would with {changes}: ")


def test_memory_beyond_the_steps_that_are_tried_grows_in_proportion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = GPT2MLConfig(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    config = FinetuneConfig(model="m", data=("d",), out="o.safetensors", batch_size=64)
    exact = estimate_memory(config, sizes).total
    monkeypatch.setattr(memory, "_MOST_CHUNKS", 8)
    assert estimate_memory(config, sizes).total == pytest.approx(exact, rel=0.01)
    enormous = dataclasses.replace(config, batch_size=1 << 30)
    assert estimate_memory(enormous, sizes).total > 1 << 42


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 1 << 30}, {"batch_size": 1 << 20, "accumulate": 1 << 16}],
    ids=["rows", "batches"],
)
def test_a_run_that_no_machine_can_hold_is_refused_at_once(
    changes: dict[str, Any], tuning_files: Path, tmp_path: Path
) -> None:
    values = settings(tuning_files, tmp_path / "out.safetensors", step_in_backward=False)
    with pytest.raises(ValueError, match=r"needs at least [\d,.]+ GiB .*batch_size"):
        finetune(FinetuneConfig(**values | changes))
    assert not (tmp_path / "out.run").exists()


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
    estimate = estimate_memory(FinetuneConfig(**values | {"data": tuple(values["data"])}))
    assert estimate.total == pytest.approx(int(ended.stdout), rel=0.15)


@pytest.mark.parametrize("text", ["22GB", "24 GiB", "800MB", "1.5G"])
def test_sizes_are_read(text: str) -> None:
    expected = {"22GB": 22e9, "24 GiB": 24 * 2**30, "800MB": 8e8, "1.5G": 1.5e9}[text]
    assert parse_size(text) == expected
