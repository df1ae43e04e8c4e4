"""Speculative decoding: drafts, from the text or from another model, change the speed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt2ml_torch import GPT2ML, Generator, Tokenizer
from gpt2ml_torch.generation.draft import DraftModel
from gpt2ml_torch.generation.engine import Engine
from gpt2ml_torch.generation.sampler import Sampler
from gpt2ml_torch.generation.stats import Stats
from tests.generation.test_generator import OPTIONS, PROMPTS
from tests.helpers.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT2ML:
    return tiny_model(tokenizer).double()  # no choice hangs on the rounding of larger products


def blurred(model: GPT2ML, tokenizer: Tokenizer, noise: float) -> GPT2ML:
    """The model with each weight a bit off: right about some tokens, wrong about others."""
    copy = tiny_model(tokenizer).double()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for ours, theirs in zip(copy.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs + noise * theirs.std() * torch.randn(theirs.shape, generator=random))
    return copy


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("drafting", ["text", "assistant"])
def test_speculation_changes_no_text(
    model: GPT2ML, tokenizer: Tokenizer, drafting: str, options: dict[str, Any]
) -> None:
    """Past the window of 64 too; and so do the log-probabilities."""
    options = {"seed": 4, "max_new_tokens": 90, **options}
    plain = Generator(model, tokenizer, compile=False)
    helper: GPT2ML | None = None
    more: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if drafting == "assistant":
        helper, more = blurred(model, tokenizer, 0.1), {"num_assistant_tokens": 3}
    helped = Generator(model, tokenizer, compile=False, assistant=helper)
    steps = step_tokens = 0
    for prompt in PROMPTS:
        stats = Stats()
        (expected,) = plain.complete(prompt, logprobs=True, **options)
        (found,) = helped.complete(prompt, logprobs=True, stats=stats, **more, **options)
        assert found.token_ids == expected.token_ids
        assert found.text == expected.text
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        assert (stats.assistant_steps > 0) == (drafting == "assistant")
        steps, step_tokens = steps + stats.steps, step_tokens + stats.step_tokens
    if drafting == "assistant":  # some drafted tokens were right, some wrong
        assert 1 < step_tokens / steps < 4


@pytest.mark.parametrize("options", [{"do_sample": False}, {"top_k": 5, "seed": 2}])
def test_all_tokens_that_the_model_itself_drafts_are_right(
    model: GPT2ML, tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    """It has the same random numbers, so that sampling agrees too."""
    generator = Generator(model, tokenizer, compile=False, assistant=model)
    stats = Stats()
    generator.complete("双", stats=stats, max_new_tokens=29, **options)
    # One token comes with the prompt, 3 + 1 with each step, the first of which is not counted.
    assert (stats.steps, stats.step_tokens, stats.assistant_steps) == (6, 24, 18)


def test_several_texts_are_decoded_together_without_the_assistant(
    model: GPT2ML, tokenizer: Tokenizer
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "seed": 1}
    helped = Generator(model, tokenizer, compile=False, assistant=model)
    stats = Stats()
    together = [text.text for text in helped.complete(PROMPTS, stats=stats, **options)]
    assert stats.assistant_steps == 0
    assert helped.complete(PROMPTS[0], stats=stats, **options)[0].text == together[0]
    assert stats.assistant_steps > 0
    stats = Stats()
    helped.complete(PROMPTS[0], stats=stats, num_assistant_tokens=0, **options)
    assert stats.assistant_steps == 0


def test_a_draft_model_proposes_as_far_as_it_can_read(model: GPT2ML, tokenizer: Tokenizer) -> None:
    draft = DraftModel(Engine(model, compile=False), length=64)
    sampler = Sampler(1, vocab_size=tokenizer.num_embeddings, device="cpu")
    assert len(draft.propose([120] * 62, 3, sampler)) == 3
    assert draft.propose([120] * 63, 3, sampler) == []


def test_an_assistant_that_does_not_fit_is_refused(model: GPT2ML, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="assistant's max_position_embeddings is 32, the model's"):
        Generator(model, tokenizer, assistant=tiny_model(tokenizer, positions=32))
    with pytest.raises(ValueError, match="assistant is on meta, the model on cpu"):
        Generator(model, tokenizer, assistant=tiny_model(tokenizer).to("meta"))
