"""The loop: schedules, evaluations, early stopping, spikes; on batches made by hand."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2ml_torch import GPT2ML, GPT2MLConfig
from gpt2ml_torch.finetuning import (
    Adafactor,
    AdamW,
    Event,
    Objective,
    Rows,
    StepSkipped,
    StepTaken,
    TrainConfig,
    Trainer,
    next_token_rows,
    parameter_groups,
)
from gpt2ml_torch.finetuning.step import LossWatch
from gpt2ml_torch.finetuning.train_config import parse_layers


def small_model() -> GPT2ML:
    torch.manual_seed(0)
    config = GPT2MLConfig(
        vocab_size=23,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
    )
    return GPT2ML(config)


class Counting:
    """Rows that count up from 1 to 12, easily learned; some steps hold noise instead."""

    steps_per_epoch = 10

    def __init__(self, *, noise_at: tuple[int, ...] = ()) -> None:
        self.noise_at = noise_at

    def batch(self, index: int) -> Rows:
        ids = torch.arange(1, 13).expand(4, 12)
        if index in self.noise_at:
            ids = torch.randint(13, 23, (4, 12), generator=torch.Generator().manual_seed(index))
        return next_token_rows(ids)


def trainer_of(model: GPT2ML, config: TrainConfig, **options: Any) -> Trainer:
    batches = options.pop("batches", Counting())
    optimizer = Adafactor(parameter_groups(model))
    return Trainer(Objective(model), optimizer, batches, config, **options)


QUICK = TrainConfig(
    steps=40, learning_rate=0.03, schedule="constant", warmup=0, precision="float32"
)


def test_schedules_warm_up_and_end_where_they_should() -> None:
    for schedule, end in (("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)):
        config = TrainConfig(schedule=schedule, learning_rate=1.0, warmup=10)
        rates = [config.learning_rate_at(step, 110) for step in range(110)]
        assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert max(rates) == 1.0
        assert rates[-1] == pytest.approx(end, abs=0.02)


def test_a_cooldown_ends_a_constant_rate() -> None:
    config = TrainConfig(
        schedule="constant", learning_rate=1.0, warmup=0, cooldown=20, final_share=0.0
    )
    rates = [config.learning_rate_at(step, 100) for step in range(100)]
    assert rates[:81] == [1.0] * 81
    assert rates[80:] == pytest.approx([1 - i / 20 for i in range(20)])
    with pytest.raises(ValueError, match="cooldown ends a constant schedule"):
        TrainConfig(schedule="cosine", cooldown=20)


def test_layers_are_named_in_several_ways() -> None:
    assert parse_layers("last:2", 6) == {4, 5}
    assert parse_layers("first:1,3-4", 6) == {0, 3, 4}
    for text in ("", "9", "last:7", "a-b", "4-2", "-1"):
        with pytest.raises(ValueError, match="train_layers"):
            parse_layers(text, 6)


def test_without_a_folder_nothing_is_written_and_the_losses_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    events: list[Event] = []
    result = trainer_of(small_model(), QUICK, callback=events.append).run()
    assert (result.reason, result.step, result.last_checkpoint) == ("done", 40, None)
    assert result.losses[-1] < 0.3 * result.losses[0]
    assert [e.loss for e in events if isinstance(e, StepTaken)] == result.losses
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_gives_the_same_losses_and_another_seed_others() -> None:
    def losses(seed: int) -> list[float]:
        model = small_model()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        return trainer_of(model, dataclasses.replace(QUICK, steps=5, seed=seed)).run().losses

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_accumulated_batches_are_one_large_batch() -> None:
    """Of different sizes: the mean is over all tokens, not over the batches' means."""

    class Halves:
        steps_per_epoch = 20

        def batch(self, index: int) -> Rows:
            whole = Counting(noise_at=(index // 2,)).batch(index // 2)
            whole.labels[0] = 0
            return Rows(*(field[2 * (index % 2) :][:2] for field in whole))

    class Whole(Halves):
        def batch(self, index: int) -> Rows:
            whole = Counting(noise_at=(index,)).batch(index)
            whole.labels[0] = 0
            return whole

    kept = dataclasses.replace(QUICK, steps=4, step_in_backward=False)
    results = []
    for batches, accumulate in ((Whole(), 1), (Halves(), 2)):
        model = small_model().double()
        config = dataclasses.replace(kept, accumulate=accumulate)
        losses = trainer_of(model, config, batches=batches).run().losses
        results.append((losses, model.token_embedding.weight.detach()))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1])


def test_gradients_are_clipped_together() -> None:
    norms = []
    moved = []
    for limit in (None, 1e-3):
        model = small_model().double()
        before = model.token_embedding.weight.detach().clone()
        config = dataclasses.replace(QUICK, steps=1, step_in_backward=False, clip_norm=limit)
        # A large eps makes the step proportional to the gradient.
        optimizer = AdamW(parameter_groups(model, weight_decay=0.0), eps=1e3)
        events: list[Event] = []
        Trainer(Objective(model), optimizer, Counting(), config, callback=events.append).run()
        norms.append(next(e.gradient_norm or 0.0 for e in events if isinstance(e, StepTaken)))
        moved.append((model.token_embedding.weight.detach() - before).norm().item())
    assert norms[0] == pytest.approx(norms[1])
    assert moved[1] / moved[0] == pytest.approx(1e-3 / norms[0], rel=1e-2)


def test_it_stops_early_where_nothing_gets_better() -> None:
    config = dataclasses.replace(QUICK, learning_rate=0.0, eval_every=3, patience=2)
    rows = Counting().batch(0)
    result = trainer_of(small_model(), config, valid_batches=lambda: [rows]).run()
    assert (result.reason, result.step, result.best_step) == ("early stop", 6, 0)


def test_a_spike_is_not_learned_from_and_stops_or_is_skipped(tmp_path: Path) -> None:
    batches = Counting(noise_at=(30,))
    config = dataclasses.replace(QUICK, checkpoint_every=8, spike_factor=2.0)
    model = small_model()
    stopped = trainer_of(model, config, batches=batches, folder=tmp_path / "stop").run()
    assert (stopped.reason, stopped.step) == ("spike", 30)
    assert stopped.trouble is not None
    assert "the loss jumped" in stopped.trouble
    assert stopped.last_checkpoint == tmp_path / "stop" / "checkpoints" / "step-00000024"
    without = small_model()
    trainer_of(without, dataclasses.replace(config, steps=30)).run()
    assert torch.equal(model.token_embedding.weight, without.token_embedding.weight)

    def losses(events: list[Event]) -> list[float]:
        return [event.loss for event in events if isinstance(event, StepTaken)]

    events: list[Event] = []
    skipping = dataclasses.replace(config, on_spike="skip")
    result = trainer_of(small_model(), skipping, batches=batches, callback=events.append).run()
    assert (result.reason, result.step) == ("done", 40)
    assert [e.at for e in events if isinstance(e, StepSkipped)] == [30]
    undisturbed: list[Event] = []  # its batches are all the same
    trainer_of(small_model(), skipping, callback=undisturbed.append).run()
    assert losses(events) == losses(undisturbed)[:39]


def test_a_loss_that_is_no_number_stops_and_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    model = small_model()

    def spoil(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 10:
            with torch.no_grad():
                model.position_embedding.weight[3, 3] = float("nan")

    config = dataclasses.replace(QUICK, checkpoint_every=4)
    result = trainer_of(model, config, callback=spoil, folder=tmp_path).run()
    assert (result.reason, result.step, result.trouble) == ("spike", 10, "the loss is nan")
    assert result.last_checkpoint == tmp_path / "checkpoints" / "step-00000008"


def test_a_watch_tells_spikes_from_noise() -> None:
    watch = LossWatch(factor=6.0)
    draw = random.Random(0)
    for _ in range(200):
        loss = draw.gauss(3.0, 0.3)
        assert watch.trouble(loss) is None
        watch.add(loss)
    assert watch.trouble(9.0) is not None
    assert watch.trouble(float("nan")) == "the loss is nan"
