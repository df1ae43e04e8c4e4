"""Biases and penalties of written tokens, against the definition of OpenAI's API reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2ml_torch import Generator
from gpt2ml_torch.generation import GenerationConfig
from gpt2ml_torch.generation.adjustments import Adjustments
from gpt2ml_torch.generation.constraints import Constraints


def constraints(**values: object) -> Constraints:
    return Constraints(banned=torch.zeros(6, dtype=torch.bool), **values)  # type: ignore[arg-type]


def test_a_row_is_adjusted_by_its_own_settings_and_its_own_tokens() -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    adjustments = Adjustments(3, vocab_size=6, device=torch.device("cpu"))
    adjustments.set(0, constraints(presence_penalty=0.5, frequency_penalty=0.25), [1, 1, 2])
    adjustments.set(1, constraints(logit_bias=((3, 7.0), (4, -7.0))), [1])
    adjustments.note(torch.tensor([2, 0, 5]))
    expected = logits.clone()
    expected[0, 1] -= 0.5 + 2 * 0.25
    expected[0, 2] -= 0.5 + 2 * 0.25
    expected[1, 3] += 7
    expected[1, 4] -= 7
    torch.testing.assert_close(adjustments.apply(logits), expected)
    adjustments.select(torch.tensor([1, 0]))
    torch.testing.assert_close(adjustments.apply(logits[[1, 0]]), expected[[1, 0]])


def test_a_copy_counts_for_itself() -> None:
    adjustments = Adjustments(1, vocab_size=6, device=torch.device("cpu"))
    adjustments.set(0, constraints(frequency_penalty=1.0), [])
    adjustments.copy().note(torch.tensor([3]))
    assert adjustments.apply(torch.zeros(1, 6))[0, 3] == 0


def test_a_frequency_penalty_ends_a_repetition(shipped_model: Path) -> None:
    generator = Generator.from_pretrained(shipped_model, compile=False)
    id_ = generator.tokenizer.encode("月")[0]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "logit_bias": {id_: 16.0}}
    (always,) = generator.generate("春", return_full_text=False, **options)
    assert always == "月" * 12
    (seldom,) = generator.generate("春", return_full_text=False, frequency_penalty=2.0, **options)
    assert 0 < seldom.count("月") < 12


def test_prompts_do_not_count_as_written(shipped_model: Path) -> None:
    generator = Generator.from_pretrained(shipped_model, compile=False)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 1, "return_full_text": False}
    plain = generator.generate("春眠不觉晓，春", **options)
    assert generator.generate("春眠不觉晓，春", presence_penalty=2.0, **options) == plain


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: float("inf")}},
        {"logit_bias": [(1, 2, 3)]},
        {"logit_bias": "x"},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        GenerationConfig(**options)  # type: ignore[arg-type]
