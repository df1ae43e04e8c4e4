"""A model that computes no numbers writes no text, and says where they were lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2ml_torch import GPT2ML, Generator, Tokenizer

WAYS: list[dict[str, Any]] = [
    {},
    {"do_sample": False},
    {"top_k": 5},
    {"top_p": 0.9},
    {"num_beams": 2},
    {"prompt_lookup_num_tokens": 3},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
]


def broken(path: Path, name: str, value: float, **options: Any) -> Generator:
    model = GPT2ML.from_pretrained(path, **options)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    return Generator(model, Tokenizer.from_pretrained(path), compile=False)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blocks.2.mlp_norm.weight", float("nan")),
        ("blocks.5.output_norm.bias", float("inf")),
        ("token_embedding.weight", float("-inf")),
    ],
)
def test_writing_stops_with_the_name_of_the_tensor(
    shipped_model: Path, name: str, value: float, options: dict[str, Any]
) -> None:
    generator = broken(shipped_model, name, value, quantize=None)
    with pytest.raises(ValueError, match=name):
        generator.generate("春眠不觉晓", max_new_tokens=4, **options)
    with pytest.raises(ValueError, match=name):
        list(generator.stream("春眠不觉晓", max_new_tokens=4, **options))
    with pytest.raises(ValueError, match=name):
        generator.score("春眠不觉晓")


def test_an_overflow_names_the_precision(shipped_model: Path) -> None:
    generator = broken(
        shipped_model, "blocks.5.output_norm.weight", 6e4, dtype=torch.float16, quantize=None
    )
    with torch.no_grad():
        generator.model.blocks[5].output_norm.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"overflowed in float16"):
        generator.generate("春眠不觉晓", max_new_tokens=4)


def test_an_assistant_that_computes_no_numbers_proposes_nothing(shipped_model: Path) -> None:
    helped = Generator.from_pretrained(shipped_model, assistant="int4")
    assert helped.assistant is not None
    expected = helped.generate("春眠不觉晓", seed=1, max_new_tokens=8)
    with torch.no_grad():
        helped.assistant.model.embedding_norm.bias[0] = torch.nan
    assert helped.generate("春眠不觉晓", seed=1, max_new_tokens=8) == expected
