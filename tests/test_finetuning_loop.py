"""The loop: schedules, spikes, and which layers are trained."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from gpt2ml_torch.finetuning import Event, FinetuneConfig, TrainConfig, finetune
from gpt2ml_torch.finetuning.config import parse_layers
from gpt2ml_torch.finetuning.spikes import LossWatch
from tests.finetuning_runs import run, settings


def test_schedules_warm_up_and_end_where_they_should() -> None:
    for schedule, end in (("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)):
        config = TrainConfig(schedule=schedule, learning_rate=1.0, warmup=10)
        rates = [config.learning_rate_at(step, 110) for step in range(110)]
        assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert max(rates) == 1.0
        assert rates[-1] == pytest.approx(end, abs=0.02)


def test_layers_are_named_in_several_ways() -> None:
    assert parse_layers("last:2", 6) == {4, 5}
    assert parse_layers("first:1,3-4", 6) == {0, 3, 4}
    for text in ("", "9", "last:7", "a-b", "4-2", "-1"):
        with pytest.raises(ValueError, match="train_layers"):
            parse_layers(text, 6)


def test_a_spike_stops_with_the_last_good_checkpoint_or_is_skipped(
    tuning_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trouble(watch: LossWatch, loss: float) -> str | None:
        count = int(watch.state()[2])
        return "the loss is nan" if count == 6 and not skipped else None

    skipped: list[bool] = []
    monkeypatch.setattr(LossWatch, "trouble", trouble)
    stopped = run(tuning_files, tmp_path / "stop.safetensors", stop_after=None)
    assert (stopped.reason, stopped.step, stopped.trouble) == ("spike", 6, "the loss is nan")
    assert stopped.last_checkpoint == tmp_path / "stop.run" / "checkpoints" / "step-00000004"

    def once(event: Event) -> None:
        if event.kind == "skip":
            skipped.append(True)

    config = FinetuneConfig(
        **settings(tuning_files, tmp_path / "skip.safetensors", on_spike="skip")
    )
    assert finetune(config, callback=once).reason == "done"
    assert skipped == [True]


def test_a_watch_tells_spikes_from_noise() -> None:
    watch = LossWatch(factor=6.0)
    draw = random.Random(0)
    for _ in range(200):
        loss = draw.gauss(3.0, 0.3)
        assert watch.trouble(loss) is None
        watch.add(loss)
    assert watch.trouble(9.0) is not None
    assert watch.trouble(float("nan")) == "the loss is nan"
