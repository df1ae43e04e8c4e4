"""What transformers' generation makes of the exported model, against `Generator`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2ml_torch import GPT2ML, Generator, Tokenizer
from tests.hf.test_modeling import PROMPTS

transformers = pytest.importorskip("transformers", reason="transformers (extra [hf]) is missing")

TOKENS = 24


@pytest.fixture(scope="module")
def expected(ours: GPT2ML, our_tokenizer: Tokenizer) -> list[str]:
    """The most probable continuations, by `Generator`."""
    generator = Generator(ours, our_tokenizer, compile=False, pack=False)
    texts = generator.generate(PROMPTS, do_sample=False, max_new_tokens=TOKENS)
    return [prompt + text.removeprefix(prompt) for prompt, text in zip(PROMPTS, texts, strict=True)]


def _texts(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> list[str]:
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    rows = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False, **options)
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def test_greedy_texts_are_the_generators(model: Any, tokenizer: Any, expected: list[str]) -> None:
    assert [_texts(model, tokenizer, [prompt])[0] for prompt in PROMPTS] == expected
    assert _texts(model, tokenizer, PROMPTS) == expected  # padded on the left


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
        {"num_beams": 1, "repetition_penalty": 1.0},
    ],
    ids=["prompt lookup", "static cache", "no cache", "neutral"],
)
def test_other_ways_to_decode_give_the_same_texts(
    model: Any, tokenizer: Any, expected: list[str], options: dict[str, Any]
) -> None:
    texts = [_texts(model, tokenizer, [prompt], **options)[0] for prompt in PROMPTS[:3]]
    assert texts == expected[:3]


def test_an_assistant_gives_the_same_texts(
    model: Any, tokenizer: Any, exported: Path, expected: list[str]
) -> None:
    assistant = transformers.AutoModelForCausalLM.from_pretrained(
        exported, trust_remote_code=True, dtype=torch.bfloat16
    )
    texts = [_texts(model, tokenizer, [p], assistant_model=assistant)[0] for p in PROMPTS[:3]]
    assert texts == expected[:3]


def test_beams_are_at_least_as_probable(model: Any, tokenizer: Any) -> None:
    batch = tokenizer(PROMPTS[0], return_tensors="pt")

    def log_likelihood(**options: Any) -> float:
        row = model.generate(**batch, max_new_tokens=8, do_sample=False, **options)
        with torch.inference_mode():
            logits = model(row).logits.log_softmax(-1)
        chosen = logits[0, :-1].gather(-1, row[0, 1:, None])
        return float(chosen[-8:].sum())

    assert log_likelihood(num_beams=6) > log_likelihood()


def test_the_pipeline_writes_single_texts_and_batches(exported: Path, expected: list[str]) -> None:
    write = transformers.pipeline("text-generation", str(exported), trust_remote_code=True)
    options = {"max_new_tokens": TOKENS, "do_sample": False}
    assert write(PROMPTS[0], **options)[0]["generated_text"] == expected[0]
    results = write(PROMPTS, batch_size=5, **options)
    assert [result[0]["generated_text"] for result in results] == expected
    assert not any(" " in text for text in expected)


def test_streamed_pieces_are_the_text(model: Any, tokenizer: Any, expected: list[str]) -> None:
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    batch = tokenizer(PROMPTS[1], return_tensors="pt")
    options = {**batch, "streamer": streamer, "max_new_tokens": TOKENS, "do_sample": False}
    thread = threading.Thread(target=model.generate, kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected[1]
    assert len(pieces) > 10


def test_embeddings_can_stand_for_the_prompt(
    model: Any, tokenizer: Any, expected: list[str]
) -> None:
    """As the adapters that learn a prompt give it."""
    batch = tokenizer(PROMPTS[0], return_tensors="pt")
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    row = model.generate(inputs_embeds=embeddings, max_new_tokens=TOKENS, do_sample=False)
    assert PROMPTS[0] + tokenizer.batch_decode(row, skip_special_tokens=True)[0] == expected[0]


def test_sampling_is_reproducible_and_bound_to_allowed_ids(model: Any, tokenizer: Any) -> None:
    batch = tokenizer(PROMPTS[:2], return_tensors="pt", padding=True)
    options = {"do_sample": True, "top_k": 5, "max_new_tokens": 12}
    rows = []
    for _ in range(2):
        transformers.set_seed(3)
        rows.append(model.generate(**batch, **options))
    assert torch.equal(*rows)
