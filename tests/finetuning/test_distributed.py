"""Several processes: the losses of one, half of everything each, and another number can go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2ml_torch import GPT2ML
from gpt2ml_torch.finetuning import FinetuneConfig
from gpt2ml_torch.finetuning.checks import check_sizes
from gpt2ml_torch.modelfile import ModelFile
from tests.helpers.finetuning_runs import losses, metrics, python, run, settings

# Without dropout, since each process draws its own; the sums of two halves round differently.
SAME: dict[str, Any] = {"precision": "float32", "dropout": 0.0, "steps": 8}
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def alone(tuning_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of one process."""
    out = tmp_path_factory.mktemp("alone") / "one.safetensors"
    run(tuning_files, out, **SAME)
    return out


def started(out: Path) -> list[dict[str, Any]]:
    return [row for row in metrics(out) if row["kind"] == "start"]


def test_two_processes_have_the_losses_of_one_and_half_of_everything_and_one_can_go_on(
    tuning_files: Path, tmp_path: Path, alone: Path
) -> None:
    """And so with bfloat16 weights, stochastically rounded, and products in float32."""
    two, rounded, rounded_alone = (
        tmp_path / f"{name}.safetensors" for name in ("two", "rounded", "rounded-alone")
    )
    bfloat16 = SAME | {"precision": "bfloat16", "upcast": True}
    ended = python(
        *("tests.helpers.finetuning_worker", "run"),
        *(json.dumps(settings(tuning_files, two, **SAME)), "5"),
        *(json.dumps(settings(tuning_files, rounded, **bfloat16)), "5"),
        processes=2,
    )
    assert ended.returncode == 0, ended.stderr
    run(tuning_files, two, resume=True, **SAME)
    assert losses(two) == pytest.approx(losses(alone), rel=ROUNDING)
    run(tuning_files, rounded_alone, stop_after=5, **bfloat16)
    # Each process rounds with random numbers of its own, so only as far as roundings matter.
    assert losses(rounded) == pytest.approx(losses(rounded_alone), rel=5e-3)
    both, single = started(two)[0], started(alone)[0]
    for what in ("weights_here", "slots_here"):
        assert both[what] == pytest.approx(single[what] / 2, rel=0.01), what


def test_two_processes_go_on_from_one_and_write_the_file(
    tuning_files: Path, tmp_path: Path, alone: Path
) -> None:
    out = tmp_path / "out.safetensors"
    run(tuning_files, out, stop_after=3, **SAME)
    values = settings(tuning_files, out, **SAME)
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in values.items()
        if name not in ("model", "data")
    ]
    command = ["gpt2ml_torch", "finetune", values["model"], *values["data"], *options, "--resume"]
    ended = python(*command, processes=2)
    assert ended.returncode == 0, ended.stderr
    assert losses(out) == pytest.approx(losses(alone), rel=ROUNDING)
    ids = torch.arange(5, 25)[None]
    # Logits, since the keys' bias has no effect: its gradient is rounding, which the rule scales.
    found, expected = (GPT2ML.from_pretrained(path)(ids) for path in (out, alone))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert ModelFile.open(out).source["finetuned"][0]["steps"] == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3}, "batch_size is 3, not divisible by 2 processes.*; use 4"),
        ({"lora_rank": 2}, "LoRA works with one process"),
        ({"optimizer": "adamw8bit"}, "8-bit AdamW works with one process"),
        ({"prompts": ("春",)}, "sampling from prompts works with one process"),
    ],
)
def test_what_does_not_combine_with_several_processes_is_an_error_at_the_start(
    changes: dict[str, Any],
    message: str,
    tuning_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpt2ml_torch.finetuning.checks.process_count", lambda: 2)
    config = FinetuneConfig(**settings(tuning_files, tmp_path / "out.safetensors", **changes))
    sizes = ModelFile.open(config.model).config
    with pytest.raises(ValueError, match=message):
        check_sizes(config, sizes)
