"""Decoding as it runs on a GPU, here on the CPU: what the host reads back, and when.

Shapes:
    B  batch rows
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt2ml_torch import GPT2ML, GenerationConfig, Generator, Tokenizer
from gpt2ml_torch.generation.batch import Batch
from gpt2ml_torch.generation.engine import Engine
from gpt2ml_torch.generation.stats import Stats
from gpt2ml_torch.generation.text import Completion, Text
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
    return pretending(plain.model, tokenizer)


def pretending(model: GPT2ML, tokenizer: Tokenizer, assistant: GPT2ML | None = None) -> Generator:
    """A generator that runs on the CPU what it would run on a GPU."""
    generator = Generator(model, tokenizer, compile=False, assistant=assistant)
    for engine in (generator.engine, generator.assistant):
        if engine is not None:
            engine.on_cuda = True
    return generator


def note_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch, events: list[str]) -> None:
    def noting(launch: Any) -> Any:
        def step(*arguments: Any, **options: Any) -> Any:
            events.append("step")
            return launch(*arguments, **options)

        return step

    for name in ("decode", "decode_and_choose"):
        monkeypatch.setattr(engine, name, noting(getattr(engine, name)))


def complete(
    generator: Generator, prompt: str, options: dict[str, Any]
) -> tuple[list[Completion], HostReads]:
    """`generator.complete`, and what was read after the options had been understood."""
    texts = generator._begin(prompt, None, options)
    with HostReads() as reads:
        for _ in generator._write_all(texts, None):
            pass
    return [text.completion() for text in texts], reads


def watch(
    generator: Generator, texts: list[Text], monkeypatch: pytest.MonkeyPatch, *, logprobs: bool
) -> tuple[list[str], HostReads]:
    """Decodes the texts: the steps and reads in their order, and what the reads were."""
    events: list[str] = []
    note_steps(generator.engine, monkeypatch, events)
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


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 4, "length_penalty": 0.0, "stop": ["。"], "min_new_tokens": 3},
        {"num_beams": 2, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
        {"num_beams": 3, "forced_start": "科学", "bad_words": ["眠"]},
    ],
    ids=str,
)
def test_a_step_of_beam_search_is_read_at_once(
    as_on_cuda: Generator,
    plain: Generator,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Integers only: ids, and the bits of their scores."""
    expected = plain.complete(PROMPTS[0], max_new_tokens=12, **options)
    events: list[str] = []
    note_steps(as_on_cuda.engine, monkeypatch, events)
    found, reads = complete(as_on_cuda, PROMPTS[0], {"max_new_tokens": 12, **options})
    assert events.count("step") > 1
    assert len(reads.found) <= events.count("step") + 1  # one with the prompt
    assert {(dtype, len(shape)) for _, dtype, shape in reads.found} == {(torch.int64, 1)}
    assert found == expected


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("drafting", ["text", "assistant"])
def test_drafted_and_checked_tokens_are_read_at_once(
    plain: Generator,
    tokenizer: Tokenizer,
    drafting: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once for each step of the model, however many tokens were drafted; only a rule that the host
    decides by takes a read for each token.
    """
    helper = tiny_model(tokenizer).double() if drafting == "assistant" else None
    lengths = {"num_assistant_tokens": 3, "prompt_lookup_num_tokens": 3 * (drafting == "text")}
    options = {"seed": 4, "max_new_tokens": 24, **options, **lengths}
    generator = pretending(plain.model, tokenizer, helper)
    expected = plain.complete(PROMPTS[2], **{**options, "prompt_lookup_num_tokens": 0})
    events: list[str] = []
    note_steps(generator.engine, monkeypatch, events)
    found, reads = complete(generator, PROMPTS[2], options)
    assert found == expected
    assert {(dtype, len(shape)) for _, dtype, shape in reads.found} == {(torch.int64, 1)}
    if "no_repeat_ngram_size" not in options:
        assert len(reads.found) <= events.count("step") + 1


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_numbers_that_are_none_are_noticed_in_what_is_read(
    tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    generator = pretending(tiny_model(tokenizer), tokenizer)
    with torch.no_grad():
        generator.model.blocks[0].mlp.down.bias[1] = torch.inf
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.down\.bias"):
        generator.generate("天天天天", max_new_tokens=6, **options)


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
