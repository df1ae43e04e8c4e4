"""Stopped, killed or out of disk: a run goes on as if nothing had happened, or says why not."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2ml_torch.finetuning import (
    CheckpointSaved,
    Evaluated,
    Event,
    FinetuneConfig,
    RunEnded,
    StepSkipped,
    StepTaken,
    checkpoints,
    finetune,
)
from gpt2ml_torch.finetuning.checkpoints import CheckpointFolder
from gpt2ml_torch.finetuning.reporting import MetricsFile
from tests.helpers.finetuning_runs import losses, python, run, same_weights, settings


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "float32", "optimizer": "adamw", "pack": True},
        {
            "precision": "mixed",
            "step_in_backward": False,
            "accumulate": 2,
            "clip_norm": 1.0,
            "layer_decay": 0.9,
        },
        {"optimizer": "adamw8bit", "train_layers": "last:1", "freeze_embeddings": True},
        {"lora_rank": 4},
        {"lora_rank": 4, "lora_base": "int8", "lora_dropout": 0.1},
    ],
    ids=["bfloat16", "float32", "mixed", "8bit", "lora", "lora-int8"],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    tuning_files: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    if changes.get("lora_rank"):
        pytest.importorskip("peft")
    if changes.get("optimizer") == "adamw8bit":
        pytest.importorskip("torchao")
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    run(tuning_files, whole, **changes)
    stopped = run(tuning_files, parts, stop_after=5, **changes)
    assert (stopped.reason, stopped.step, stopped.model) == ("interrupted", 5, None)
    assert not parts.exists()
    run(tuning_files, parts, resume=True, **changes)
    assert len(losses(whole)) == 12 + 4
    assert losses(parts) == losses(whole)
    assert same_weights(whole, parts)


def test_ten_kills_lose_nothing(tuning_files: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "killed.safetensors", tmp_path / "whole.safetensors"
    changes = {"steps": 60, "eval_every": 10, "checkpoint_every": 3}
    text = json.dumps(settings(tuning_files, out, **changes))
    ended = python("tests.helpers.finetuning_worker", "kill", text, "10", "7", timeout=110)
    assert ended.returncode == 0, ended.stderr
    run(tuning_files, whole, **changes)
    assert losses(out) == losses(whole)
    assert same_weights(whole, out)


def test_resuming_with_other_settings_is_refused(tuning_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    run(tuning_files, out, stop_after=5)
    with pytest.raises(ValueError, match=r"learning_rate 0\.01, now it is 0\.02"):
        run(tuning_files, out, resume=True, learning_rate=2e-2)
    other = tmp_path / "other.txt"
    other.write_text(
        (tuning_files / "text.txt").read_text("utf-8") + "\n\n春眠不觉晓处处闻啼鸟", "utf-8"
    )
    with pytest.raises(ValueError, match="another model, other data"):
        run(tuning_files, out, resume=True, data=(str(other),))
    with pytest.raises(OSError, match="resume=True"):
        run(tuning_files, out)


def test_out_of_disk_the_earlier_checkpoint_stays_and_the_run_goes_on_from_it(
    tuning_files: Path, tmp_path: Path
) -> None:
    """The system refuses files beyond a size, as it does beyond the disk's."""
    out, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up(event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))

    try:
        with pytest.raises(OSError, match=r"can't write the checkpoint .*step-00000008"):
            finetune(FinetuneConfig(**settings(tuning_files, out)), callback=fill_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints = tmp_path / "out.run" / "checkpoints"
    assert [entry.name for entry in checkpoints.iterdir()] == ["step-00000004"]
    run(tuning_files, out, resume=True)
    run(tuning_files, whole)
    assert losses(out) == losses(whole)


def test_a_metrics_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"can't write .*metrics.jsonl: File too large"):
            metrics(RunEnded(step=1, reason="done", best_step=None, best_loss=None))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_run_killed_before_its_first_checkpoint_starts_over(
    tuning_files: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"

    def fail(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(FinetuneConfig(**settings(tuning_files, out)), callback=fail)
    run(tuning_files, out, resume=True)
    run(tuning_files, whole)
    assert losses(out) == losses(whole)


def test_a_damaged_checkpoint_is_named(tuning_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    run(tuning_files, out, stop_after=5)
    folder = tmp_path / "out.run" / "checkpoints" / "step-00000005"
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-00000005 does not fit .* or is damaged"):
        run(tuning_files, out, resume=True)
    (folder / "progress.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"is damaged: progress\.json is not JSON"):
        run(tuning_files, out, resume=True)


def test_checkpoints_come_by_the_minute_too(tuning_files: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    out = tmp_path / "out.safetensors"
    values = settings(tuning_files, out, steps=3, eval_every=3, checkpoint_minutes=0.0)
    finetune(FinetuneConfig(**values), callback=events.append)
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [1, 2, 3]


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in range(1, 7):
        folder.save(step, {"a": torch.zeros(1)}, {"best_step": 2})
    assert folder.steps() == [2, 5, 6]


def test_a_full_disk_is_called_full(
    tuning_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both where the room is missing before writing, and where PyTorch's writer runs out of it."""
    folder = CheckpointFolder(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        with pytest.raises(OSError, match=r"step-00000001: disk full; make room") as caught:
            folder.save(1, {"a": torch.zeros(1000)}, {"best_step": None})
    assert caught.value.errno == errno.ENOSPC
    words = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert checkpoints._as_os_error(words).errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_prune_left_goes_when_the_run_goes_on(
    tuning_files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    run(tuning_files, out, stop_after=5)
    doomed = tmp_path / "out.run" / "checkpoints" / "step-00000003.partial"
    doomed.mkdir()
    (doomed / "progress.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="learning_rate"):
        run(tuning_files, out, resume=True, learning_rate=2e-2)
    assert not doomed.exists()


def test_metrics_are_json_even_where_a_loss_is_not_a_number(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics(StepSkipped(step=1, loss=float("nan"), reason="the loss is nan", at=1))
    metrics(Evaluated(step=1, best=False, loss=float("inf"), perplexity=2.0))
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["loss"] for row in rows] == [None, None]
    assert "bits_per_character" not in rows[1]
