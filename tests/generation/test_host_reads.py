"""Decoding as it runs on a GPU, here on the CPU: what the host reads back, and when.

Shapes:
    B  batch rows
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt2ml_torch import GenerationConfig, Generator, Tokenizer
from gpt2ml_torch.generation.batch import Batch
from gpt2ml_torch.generation.stats import Stats
from gpt2ml_torch.generation.text import Text
from tests.helpers.host_reads import HostReads
from tests.helpers.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["今天天气不错", "双", "春眠不觉晓，处处闻啼鸟。"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"do_sample": False},
    {"max_new_tokens": 80},  # past the window of 64
    {"top_k": 3, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "temperature": 0.7},
    {"top_p": 0.8, "top_p_rule": "grover", "repetition_penalty": 1.3},
    {"do_sample": False, "no_repeat_ngram_size": 2},
    {"forced_start": "科学", "forced_end": "知多少"},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": [(105, 2.0)]},
    {"stop": ["。"], "min_new_tokens": 5, "eos_token_id": [104, 110, 115]},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def plain(tokenizer: Tokenizer) -> Generator:
    return Generator(tiny_model(tokenizer).double(), tokenizer, compile=False)


@pytest.fixture(scope="module")
def as_on_cuda(plain: Generator, tokenizer: Tokenizer) -> Generator:
    generator = Generator(plain.model, tokenizer, compile=False)
    generator.engine.on_cuda = True
    return generator


def watch(
    generator: Generator, texts: list[Text], monkeypatch: pytest.MonkeyPatch, *, logprobs: bool
) -> tuple[list[str], HostReads]:
    """Decodes the texts: the steps and reads in their order, and what the reads were."""
    events: list[str] = []
    decode = generator.engine.decode

    def launch(*arguments: Any) -> torch.Tensor:
        events.append("step")
        return decode(*arguments)

    monkeypatch.setattr(generator.engine, "decode", launch)
    batch = Batch(generator.engine, texts, logprobs=logprobs, stats=Stats())
    with HostReads(lambda: events.append("read")) as reads:
        for _ in batch.write():
            pass
    return events, reads


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_reads_back_its_ids_once_and_nothing_else(
    as_on_cuda: Generator,
    plain: Generator,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = GenerationConfig(**{"max_new_tokens": 24, "seed": 4, **options})
    texts = [as_on_cuda.new_text(prompt, config, sample=i) for i, prompt in enumerate(PROMPTS)]
    events, reads = watch(as_on_cuda, texts, monkeypatch, logprobs=False)
    assert len(reads.found) <= events.count("step") + 1
    assert {(dtype, len(shape)) for _, dtype, shape in reads.found} == {(torch.int64, 1)}
    expected = plain.complete(PROMPTS, config)
    assert [text.completion() for text in texts] == expected


def test_the_next_step_is_launched_before_the_last_ids_are_read(
    as_on_cuda: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GenerationConfig(max_new_tokens=10, seed=1)
    texts = [as_on_cuda.new_text(prompt, config) for prompt in PROMPTS]
    events, _ = watch(as_on_cuda, texts, monkeypatch, logprobs=False)
    assert events == ["step", "read"] * 9 + ["read"]


def test_bad_words_are_read_before_the_step_that_they_decide(
    as_on_cuda: Generator, plain: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read more for each time that a token is chosen again."""
    free = plain.complete(PROMPTS[0], seed=1, max_new_tokens=10)[0].text
    config = GenerationConfig(max_new_tokens=10, seed=1, bad_words=(free[3],))
    texts = [as_on_cuda.new_text(PROMPTS[0], config)]
    events, reads = watch(as_on_cuda, texts, monkeypatch, logprobs=False)
    assert events[0] == "read"
    assert {(dtype, len(shape)) for _, dtype, shape in reads.found} == {(torch.int64, 1)}
    assert [text.completion() for text in texts] == plain.complete(PROMPTS[0], config)


def test_log_probabilities_are_read_when_the_texts_have_ended(
    as_on_cuda: Generator, plain: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GenerationConfig(max_new_tokens=10, seed=1, eos_token_id=(104, 110, 115))
    texts = [as_on_cuda.new_text(prompt, config, sample=i) for i, prompt in enumerate(PROMPTS)]
    _, reads = watch(as_on_cuda, texts, monkeypatch, logprobs=True)
    floats = [place for place, read in enumerate(reads.found) if read[1].is_floating_point]
    assert 1 <= len(floats) <= len(PROMPTS)  # rows that end early take theirs along
    assert floats[-1] == len(reads.found) - 1
    expected = plain.complete(PROMPTS, config, logprobs=True)
    for text, other in zip(texts, expected, strict=True):
        assert len(text.logprobs) == text.count
        assert text.logprobs == pytest.approx(other.logprobs, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"bad_words": ["眠"]}, {"do_sample": False}], ids=str)
def test_logits_that_are_no_numbers_are_noticed_with_the_ids(
    tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    generator = Generator(tiny_model(tokenizer), tokenizer, compile=False, pack=False)
    generator.engine.on_cuda = True
    with torch.no_grad():
        generator.model.blocks[1].mlp_norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp_norm\.weight"):
        generator.generate(PROMPTS, seed=1, max_new_tokens=4, **options)
