"""Stochastic rounding: exact on average, independent, repeatable, and what it is good for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gpt2ml_torch.finetuning import (
    AdamW,
    Evaluated,
    Event,
    FinetuneConfig,
    finetune,
    round_stochastically_,
)


def test_rounding_goes_to_the_two_neighbours_with_the_right_frequency() -> None:
    low, high = (torch.tensor(v, dtype=torch.bfloat16).float() for v in (1.0, 1.0078125))
    for share in (0.1, 0.5, 0.93):
        for sign in (1.0, -1.0):
            value = (low + share * (high - low)) * sign
            target = torch.empty(200_000, dtype=torch.bfloat16)
            generator = torch.Generator().manual_seed(1)
            round_stochastically_(target, value.expand(200_000), generator=generator)
            found = (target.float() * sign - low) / (high - low)
            assert set(found.tolist()) == {0.0, 1.0}
            assert abs(found.mean().item() - share) < 5 * (0.25 / 200_000) ** 0.5


def test_rounding_keeps_what_is_representable_and_what_is_not_finite() -> None:
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_stochastically_(torch.empty_like(exact), exact.float()), exact)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    odd = torch.cat(
        [odd, torch.tensor([-1], dtype=torch.int32).view(torch.float32)]
    )  # NaN, all ones
    found = round_stochastically_(torch.empty(5, dtype=torch.bfloat16), odd)
    torch.testing.assert_close(found.float(), odd, rtol=0, atol=0, equal_nan=True)


def test_rounding_repeats_with_the_generator_and_errors_are_independent() -> None:
    source = torch.randn(4000)
    results = []
    for seed in (3, 3, 4):
        generator = torch.Generator().manual_seed(seed)
        target = torch.empty(4000, dtype=torch.bfloat16)
        results.append(round_stochastically_(target, source, generator=generator))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    up = torch.empty(40_000, dtype=torch.bfloat16)
    round_stochastically_(up, torch.full((40_000,), 1.0 + 0.00390625))
    bits = (up.float() > 1).float() * 2 - 1
    for lag in range(1, 9):  # four neighbours share one draw of 64 bits
        assert abs((bits[lag:] * bits[:-lag]).mean().item()) < 0.03


def test_rounding_refuses_other_dtypes_and_shapes() -> None:
    with pytest.raises(ValueError, match="float32 to bfloat16"):
        round_stochastically_(torch.empty(2), torch.empty(2))
    with pytest.raises(ValueError, match="differ"):
        round_stochastically_(torch.empty(2, dtype=torch.bfloat16), torch.empty(3))


def test_stochastic_rounding_keeps_small_updates_that_rounding_to_nearest_loses() -> None:
    moved = {}
    for stochastic in (True, False):
        weight = nn.Parameter(torch.full((64, 64), 0.5, dtype=torch.bfloat16))
        optimizer = AdamW(
            [weight], lr=1e-5, weight_decay=0.0, stochastic_rounding=stochastic, seed=1
        )
        for _ in range(50):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[stochastic] = 0.5 - weight.float().mean().item()
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(50e-5, rel=0.3)


YUAN = """枯藤老树昏鸦，小桥流水人家，古道西风瘦马。夕阳西下，断肠人在天涯。
峰峦如聚，波涛如怒，山河表里潼关路。望西都，意踌躇。伤心秦汉经行处，宫阙万间都做了土。兴，百姓苦；亡，百姓苦。
碧云天，黄花地，西风紧，北雁南飞。晓来谁染霜林醉？总是离人泪。
没来由犯王法，不提防遭刑宪，叫声屈动地惊天。顷刻间游魂先赴森罗殿，怎不将天地也生埋怨。
有日月朝暮悬，有鬼神掌着生死权。天地也只合把清浊分辨，可怎生糊突了盗跖颜渊。
孤村落日残霞，轻烟老树寒鸦，一点飞鸿影下。青山绿水，白草红叶黄花。
"""


def test_on_the_shipped_model_stochastic_rounding_learns_as_float32_and_nearest_does_not(
    shipped_model: Path, tmp_path: Path
) -> None:
    """How far the loss on the text itself falls at the default rate, which is a gentle one."""
    text = tmp_path / "yuan.txt"
    text.write_text(YUAN, encoding="utf-8")
    fallen = {}
    for name, settings in (
        ("float32", {"precision": "float32"}),
        ("stochastic", {}),
        ("nearest", {"stochastic_rounding": False}),
    ):
        events: list[Event] = []
        config = FinetuneConfig(
            model=str(shipped_model),
            data=(str(text),),
            valid=(str(text),),
            out=str(tmp_path / f"{name}.safetensors"),
            cache=str(tmp_path / "cache"),
            separator="line",
            batch_size=6,
            steps=20,
            schedule="constant",
            eval_every=20,
            gradient_checkpointing=False,
            **settings,
        )
        finetune(config, callback=events.append)
        losses = [event.loss for event in events if isinstance(event, Evaluated)]
        fallen[name] = losses[0] - losses[-1]
    assert fallen["float32"] > 0.2
    assert fallen["stochastic"] == pytest.approx(fallen["float32"], rel=0.02)
    assert fallen["nearest"] < 0.3 * fallen["float32"]
