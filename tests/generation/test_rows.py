"""Rows of one batch with settings of their own: each text is the one that it is alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from gpt2ml_torch import GPT2ML, GenerationConfig, Generator, Tokenizer, kernels, sampling
from gpt2ml_torch.generation.constraints import Constraints
from gpt2ml_torch.generation.sampler import Sampler, SamplingParams
from tests.helpers.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: list[dict[str, Any]] = [
    {"max_new_tokens": 90},  # past the window of 64
    {"do_sample": False, "no_repeat_ngram_size": 3, "max_new_tokens": 80},
    {"top_k": 3, "temperature": 0.7, "max_new_tokens": 5},
    {"top_p": 0.9, "top_p_rule": "grover", "repetition_penalty": 1.4},
    {"min_p": 0.05, "typical_p": 0.9, "num_return_sequences": 2},
    {"stop": ["。", "眠"], "min_new_tokens": 9, "eos_token_id": [104, 110, 115]},
    {"bad_words": ["春", "间间"], "forced_start": "科学", "forced_end": "知多少"},
    {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12},
    {"prompt_lookup_num_tokens": 3},
    {"window_keep": 10, "max_new_tokens": 70, "suppress_tokens": [105, 106]},
]
PROMPTS = ["今天天气不错", "双", "春眠不觉晓，处处闻啼鸟。", "今天", "hello world"] * 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module", params=["eager", "int8"])
def generator(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> Generator:
    model: GPT2ML = tiny_model(tokenizer)
    if request.param == "eager":
        return Generator(model.double(), tokenizer, compile=False, batch_size=5)
    if not kernels.load_kernels():
        pytest.skip("the kernels could not be built")
    return Generator(kernels.pack_model(model, "int8"), tokenizer, batch_size=5)


def test_texts_with_configurations_of_their_own_are_those_alone(generator: Generator) -> None:
    configs = [
        GenerationConfig(seed=seed, **{"max_new_tokens": 30, **options})
        for seed, options in enumerate(SETTINGS)
    ]
    alone = [
        text
        for prompt, config in zip(PROMPTS, configs, strict=True)
        for text in generator.complete(prompt, config)
    ]
    assert generator.complete(PROMPTS, configs) == alone
    streamed = [""] * len(alone)
    for row, piece in generator.stream_many(PROMPTS, configs):
        streamed[row] += piece
    assert streamed == [text.full_text for text in alone]


def test_options_change_every_configuration(generator: Generator) -> None:
    configs = [GenerationConfig(seed=1), GenerationConfig(seed=1, do_sample=False)]
    texts = generator.complete(["今天", "今天"], configs, max_new_tokens=4)
    assert [len(text.token_ids) for text in texts] == [4, 4]


def test_as_many_configurations_as_prompts_are_expected(generator: Generator) -> None:
    with pytest.raises(ValueError, match="config holds 1 configurations for 2 prompts"):
        generator.generate(["今天", "双"], [GenerationConfig()])


# -- rows that come and go ------------------------------------------------------------------------

V = 2000  # more than are looked at without looking for candidates first
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=None),
    SamplingParams(temperature=0.6, top_k=5),
    SamplingParams(top_p=0.9),
    SamplingParams(grover_top_p=0.8, min_p=0.01),
    SamplingParams(typical_p=0.7),
]


def constraints(number: int) -> Constraints:
    banned = torch.zeros(V, dtype=torch.bool)
    banned[number : number + 500] = True
    return Constraints(
        banned=banned,
        no_repeat_ngram_size=number % 3,
        repetition_penalty=1.0 + 0.2 * (number % 2),
        end_ids=frozenset(range(600, 1200)),
        min_new_tokens=number % 5,
        forced={2: 7} if number % 4 == 0 else {},
    )


def logits_of(number: int, step: int) -> torch.Tensor:
    return torch.randn(1, V, generator=torch.Generator().manual_seed(1000 * number + step)) * 3


def alone(number: int, steps: int) -> list[int]:
    """What one row writes in a sampler of its own."""
    sampler = Sampler(1, vocab_size=V, device="cpu")
    ids: list[int] = [number]
    add(sampler, 0, number, ids)
    for step in range(steps):
        chosen = sampler.choose(logits_of(number, step))
        sampler.advance(chosen)
        ids.append(int(chosen))
    return ids


def add(sampler: Sampler, row: int, number: int, ids: list[int]) -> None:
    sampler.add(
        row,
        constraints(number),
        PARAMS[number % len(PARAMS)],
        key=sampling.row_key(number, 0),
        history=ids,
    )


@pytest.mark.parametrize("per_row", [False, True], ids=["grouped", "columns"])
def test_rows_are_added_dropped_and_moved_without_a_word_changing(per_row: bool) -> None:
    """Both ways to draw: groups of equal settings, and, as on CUDA, a column for each rule."""
    shuffle = random.Random(0)
    rows, steps = 4, 6
    sampler = Sampler(rows, vocab_size=V, device="cpu", per_row=per_row)
    waiting = list(range(14))
    running: dict[int, tuple[int, list[int]]] = {}  # row -> number, its ids
    written: dict[int, list[int]] = {}
    while waiting or running:
        for row in range(rows):
            if row not in running and waiting and shuffle.random() < 0.5:
                number = waiting.pop()
                running[row] = number, [number]
                add(sampler, row, *running[row])
        logits = torch.zeros(rows, V)
        for row, (number, ids) in running.items():
            logits[row] = logits_of(number, len(ids) - 1)
        chosen = sampler.choose(logits)
        sampler.advance(chosen)
        for row, (number, ids) in list(running.items()):
            ids.append(int(chosen[row]))
            if len(ids) == steps + 1:
                written[number] = running.pop(row)[1]
                sampler.drop(row)
        if shuffle.random() < 0.3:
            kept = sorted(running, key=lambda _: shuffle.random())
            sampler.select(kept, rows)
            running = {to: running[row] for to, row in enumerate(kept)}
    assert written == {number: alone(number, steps) for number in written}
    assert len(written) == 14
