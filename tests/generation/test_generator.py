"""Generator on a tiny random model, uncompiled: what it writes, and where it stops."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch

from gpt2ml_torch import GPT2ML, GenerationConfig, Generator, Tokenizer
from tests.helpers.tiny import WORDS, tiny_model, tiny_tokenizer

PROMPTS = ["今天天气不错", "双", "春眠不觉晓，处处闻啼鸟。"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT2ML:
    # In float64 the rounding of larger products is far below what could change a choice.
    return tiny_model(tokenizer).double()


@pytest.fixture(scope="module")
def generator(model: GPT2ML, tokenizer: Tokenizer) -> Generator:
    return Generator(model, tokenizer, compile=False)


def reference_greedy(model: GPT2ML, tokenizer: Tokenizer, prompt: str, count: int) -> list[int]:
    """No cache, no windows: the whole text through the model for each token."""
    ids = tokenizer.encode(prompt)
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        logits[list(tokenizer.banned_ids)] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[start:]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_a_model_without_a_cache(
    model: GPT2ML, tokenizer: Tokenizer, generator: Generator, prompt: str
) -> None:
    found = generator.complete(prompt, do_sample=False, max_new_tokens=30)[0]
    assert list(found.token_ids) == reference_greedy(model, tokenizer, prompt, 30)
    assert found.finish_reason == "length"


OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.9, "temperature": 0.8},
    {"top_p": 0.9, "top_p_rule": "grover"},
    {"min_p": 0.05, "typical_p": 0.95},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"do_sample": False, "no_repeat_ngram_size": 3},
    {"stop": ["。", "眠"], "min_new_tokens": 5},
    {"bad_words": ["春", "间间"], "forced_start": "科学"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_row_writes_the_same_alone_in_a_batch_and_streamed(
    generator: Generator, options: dict[str, Any]
) -> None:
    options = {"seed": 11, "max_new_tokens": 90, **options}  # past the window of 64
    together = generator.generate(PROMPTS, **options)
    streamed = [""] * len(PROMPTS)
    for row, piece in generator.stream_many(PROMPTS, **options):
        streamed[row] += piece
    assert streamed == together
    assert generator.generate(PROMPTS[:1], **options) == together[:1]
    assert "".join(generator.stream(PROMPTS[0], **options)) == together[0]
    assert generator.generate(PROMPTS[:2], **options) == together[:2]


def test_small_batches_write_what_one_large_batch_writes(
    model: GPT2ML, tokenizer: Tokenizer
) -> None:
    options: dict[str, Any] = {"num_return_sequences": 3, "max_new_tokens": 20, "seed": 1}
    large = Generator(model, tokenizer, compile=False, batch_size=16).generate(PROMPTS, **options)
    small = Generator(model, tokenizer, compile=False, batch_size=2).generate(PROMPTS, **options)
    assert small == large
    assert [text[: len(PROMPTS[i // 3])] for i, text in enumerate(large)] == [
        PROMPTS[i // 3] for i in range(9)
    ]
    assert len(set(large)) == 9


def test_seeds_repeat_and_differ(generator: Generator) -> None:
    first = generator.generate("今天", seed=1, max_new_tokens=20)
    assert generator.generate("今天", seed=1, max_new_tokens=20) == first
    assert generator.generate("今天", seed=2, max_new_tokens=20) != first
    unseeded = {generator.generate("今天", max_new_tokens=20)[0] for _ in range(3)}
    assert len(unseeded) == 3


def test_a_full_window_slides(model: GPT2ML, tokenizer: Tokenizer) -> None:
    """Each token is what the model says after the last `window_keep` tokens and what came since."""
    generator = Generator(model, tokenizer, compile=False)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 150, "window_keep": 10}
    found = list(generator.complete("今天", **options)[0].token_ids)
    ids, start, expected = tokenizer.encode("今天"), 0, []
    for _ in range(150):
        if len(ids) - start > 64:
            start = len(ids) - 10
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:]]))[0, -1]
        logits[list(tokenizer.banned_ids)] = -torch.inf
        expected.append(int(logits.argmax()))
        ids.append(expected[-1])
    assert found == expected


def test_a_long_prompt_is_cut_with_a_warning_or_refused(
    generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    long = "今天" * 50
    with caplog.at_level(logging.WARNING):
        text = generator.generate(long, max_new_tokens=5, do_sample=False)[0]
    assert text.startswith(long)
    assert "100 tokens was cut to its last 64" in caplog.text
    cut = generator.complete("今天" * 32, max_new_tokens=5, do_sample=False)[0]
    assert text == long + cut.text
    with pytest.raises(ValueError, match="100 tokens, the model sees 64"):
        generator.generate(long, on_long_prompt="error")


def scripted(text: str, tokenizer: Tokenizer) -> dict[str, Any]:
    ids = tokenizer.encode(text)
    return {"forced_ids": dict(enumerate(ids)), "max_new_tokens": len(ids), "seed": 0}


@pytest.mark.parametrize(
    ("stop", "minimum", "expected"),
    [
        ("。", 0, "花落。"),
        ("。", 3, "花落。"),  # the third token is the first that may end
        ("。", 4, "花落。知多少。"),
        ("多少", 0, "花落。知多少"),
        (["少", "多少。"], 0, "花落。知多少"),
        ("llo w", 0, "花落。知多少。hello w"),  # across tokens, and inside one
        ("helloing", 0, "花落。知多少。hello worlding今"),
        ("WORLD", 0, "花落。知多少。hello world"),  # the vocabulary has no upper case
    ],
)
def test_stop_strings(
    generator: Generator, tokenizer: Tokenizer, stop: Any, minimum: int, expected: str
) -> None:
    script = scripted("花落。知多少。hello worlding今", tokenizer)
    text = generator.generate("双", stop=stop, min_new_tokens=minimum, **script)[0]
    assert text == "双" + expected
    pieces = generator.stream("双", stop=stop, min_new_tokens=minimum, **script)
    assert "".join(pieces) == text


def test_end_tokens_end_the_text_and_are_no_part_of_it(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    forced = {0: tokenizer.encode("春")[0], 1: 102, 2: 102, 3: tokenizer.encode("眠")[0]}
    options: dict[str, Any] = {"forced_ids": forced, "max_new_tokens": 4, "seed": 0}
    by_id = generator.complete("双", eos_token_id=102, **options)[0]
    assert (by_id.text, by_id.finish_reason, len(by_id.token_ids)) == ("春", "stop", 1)
    assert generator.complete("双", stop="[SEP]", **options)[0] == by_id


def test_an_end_token_is_not_chosen_before_the_minimum(generator: Generator) -> None:
    ends = [
        text.token_ids
        for text in generator.complete(
            ["今"] * 8,
            eos_token_id=list(range(104, 134)),
            min_new_tokens=12,
            max_new_tokens=30,
            seed=3,
        )
    ]
    assert all(len(ids) >= 12 for ids in ends)
    assert any(len(ids) < 30 for ids in ends)


def test_special_and_reserved_ids_are_never_written_unless_allowed(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "temperature": 100.0, "seed": 0}
    texts = generator.complete(["今"] * 8, **options)
    written = {id_ for text in texts for id_ in text.token_ids}
    assert not written & set(tokenizer.banned_ids)
    assert len(written) > 30
    unknown = tokenizer.unk_id
    texts = generator.complete(["今"] * 8, allow_tokens=[unknown], **options)
    assert unknown in {id_ for text in texts for id_ in text.token_ids}


def test_banned_ids_and_strings(generator: Generator, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "seed": 0}
    banned = tokenizer.encode("春眠间")
    texts = generator.complete(["今"] * 8, suppress_tokens=banned, **options)
    assert not {id_ for text in texts for id_ in text.token_ids} & set(banned)
    words = ["眠", "hello", "间春", "今今"]
    texts = generator.complete(["今"] * 8, bad_words=words, **options)
    assert not [word for word in words for text in texts if word in text.full_text]
    assert any("间" in text.text for text in texts)


def test_forced_text(generator: Generator, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 0, "num_return_sequences": 3}
    for text in generator.complete("今", forced_start="科学", forced_end="知多少。", **options):
        assert text.text.startswith("科学")
        assert text.text.endswith("知多少。")
        assert len(text.token_ids) == 12
    last = generator.complete("今", forced_ids={-1: tokenizer.encode("。")[0]}, **options)
    assert all(text.text.endswith("。") for text in last)


@pytest.mark.parametrize(
    ("prompt", "written", "expected"),
    [
        ("hello", "world", "hello world"),
        ("hello ", "world", "hello world"),
        ("Hello", "今", "Hello今"),
        ("hello", "2 3", "hello 2 3"),
        ("今", "hello", "今hello"),
        ("今 ", "天", "今 天"),
    ],
)
def test_the_prompt_stays_as_typed_and_joins_its_continuation(
    generator: Generator, tokenizer: Tokenizer, prompt: str, written: str, expected: str
) -> None:
    script = scripted(written, tokenizer)
    assert generator.generate(prompt, **script) == [expected]
    assert generator.generate(prompt, return_full_text=False, **script) == [
        expected.removeprefix(prompt)
    ]
    assert "".join(generator.stream(prompt, **script)) == expected


def test_a_continuation_piece_joins_the_prompts_last_word(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    id_ = tokenizer.token_to_id("##ing")
    assert generator.generate("hello", forced_ids={0: id_}, max_new_tokens=1) == ["helloing"]


def test_logprobs_are_those_of_scoring(generator: Generator, tokenizer: Tokenizer) -> None:
    words = [id_ for word in WORDS if (id_ := tokenizer.token_to_id(word)) is not None]
    options: dict[str, Any] = {"max_new_tokens": 20, "seed": 2, "top_k": 3}
    found = generator.complete("今天", logprobs=True, suppress_tokens=words, **options)[0]
    score = generator.score(found.full_text)[0]
    assert score.token_ids[2:] == found.token_ids
    assert score.token_logprobs[1:] == pytest.approx(found.logprobs, abs=1e-6)
    assert score.perplexity == pytest.approx(math.exp(-score.log_likelihood / 21))


def test_scoring_is_the_same_in_batches_and_handles_long_texts(generator: Generator) -> None:
    texts = ["今天天气", "双", "春眠不觉晓" * 30, "hello world"]
    together = generator.score(texts)
    for text, score in zip(texts, together, strict=True):
        alone = generator.score(text)[0]
        assert alone.token_logprobs == pytest.approx(score.token_logprobs, abs=1e-6)
        assert len(score.token_logprobs) == len(score.token_ids) - 1
    assert math.isnan(together[1].perplexity)


def test_a_stream_can_be_closed(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = mock.Mock(side_effect=generator.engine.decode)
    monkeypatch.setattr(generator.engine, "decode", counted)
    stream = generator.stream("今天", max_new_tokens=1000, seed=0)
    assert next(stream) == "今天"
    for _ in range(3):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert counted.call_count <= 4


def test_samples_of_a_prompt_read_it_once(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = mock.Mock(side_effect=generator.engine.prefill)
    monkeypatch.setattr(generator.engine, "prefill", counted)
    generator.generate(PROMPTS[:2], num_return_sequences=4, max_new_tokens=3)
    assert counted.call_count == 2


# -- beam search ----------------------------------------------------------------------------------


def exhaustive(
    model: GPT2ML, tokenizer: Tokenizer, allowed: list[int], length: int, penalty: float, end: int
) -> list[tuple[float, tuple[int, ...]]]:
    """Every text over `allowed` of at most so many tokens, scored as beam search does."""
    prompt = tokenizer.encode("今天")
    found: dict[tuple[int, ...], float] = {}
    for ids in product(allowed, repeat=length):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(ids)]))[0, len(prompt) - 1 : -1]
        mask = torch.full_like(logits, -torch.inf)
        mask[:, allowed] = 0
        log_p = (logits + mask).log_softmax(-1)
        total = 0.0
        for place, id_ in enumerate(ids):
            total += float(log_p[place, id_])
            if id_ == end or place == length - 1:
                found[ids[: place + 1]] = total / (place + 1) ** penalty
                break
    return sorted(((score, ids) for ids, score in found.items()), reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5, 2.0])
def test_wide_beams_agree_with_an_exhaustive_search(
    model: GPT2ML, tokenizer: Tokenizer, generator: Generator, penalty: float
) -> None:
    allowed = tokenizer.encode("春眠间。")
    others = sorted(set(range(tokenizer.num_embeddings)) - set(allowed))
    expected = exhaustive(model, tokenizer, allowed, 4, penalty, end=allowed[-1])[:5]
    found = generator.complete(
        "今天",
        num_beams=256,
        num_return_sequences=5,
        length_penalty=penalty,
        max_new_tokens=4,
        stop="。",
        suppress_tokens=others,
    )
    assert [text.token_ids for text in found] == [ids for _, ids in expected]
    assert [text.score for text in found] == pytest.approx([score for score, _ in expected])


def test_one_more_beam_than_greedy_is_never_less_probable(generator: Generator) -> None:
    options: dict[str, Any] = {"max_new_tokens": 80, "length_penalty": 0.0}
    greedy = generator.complete("今天", do_sample=False, logprobs=True, max_new_tokens=80)[0]
    beams = generator.complete("今天", num_beams=6, num_return_sequences=6, **options)
    scores = [text.score for text in beams if text.score is not None]
    assert scores == sorted(scores, reverse=True)
    assert len({text.text for text in beams}) == 6
    assert scores[0] > math.fsum(greedy.logprobs) - 1.0


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"min_new_tokens": 300}, "more than max_new_tokens"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": "0.9"}, "top_p is '0.9'"),
        ({"top_p_rule": "openai"}, "top_p_rule is 'openai'"),
        ({"min_p": 2}, "min_p is 2"),
        ({"typical_p": 0}, "typical_p is 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "more than num_beams"),
        ({"num_return_sequences": True}, "num_return_sequences is True"),
        ({"do_sample": 1}, "do_sample is 1"),
        ({"stop": [""]}, "stop holds ''"),
        ({"stop": 5}, "stop is 5"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"forced_ids": [1]}, "forced_ids is 1"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"window_keep": 0}, "window_keep is 0"),
        ({"on_long_prompt": "no"}, "on_long_prompt is 'no'"),
        ({"length_penalty": math.inf}, "length_penalty is inf"),
        ({"max_tokens": 5}, "unknown generation option 'max_tokens'"),
        ({"topk": 5}, "did you mean top_k"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        GenerationConfig().replace(**options)


def test_options_that_the_model_refuses(generator: Generator) -> None:
    def fails(message: str) -> Callable[..., None]:
        def check(prompts: Any = "今", **options: Any) -> None:
            with pytest.raises(ValueError, match=message):
                generator.generate(prompts, **options)

        return check

    fails("holds no token")("")
    fails("holds no token")(["今", " "])
    fails("token id 5000 is out of range")(suppress_tokens=[5000])
    fails("window_keep is 64")(window_keep=64)
    fails("expected str")([5])
    fails("every token is banned")(suppress_tokens=list(range(146)))
    fails("take 4 tokens")(forced_start="今天", forced_end="知多", max_new_tokens=3)


def test_a_configuration_survives_its_dictionary() -> None:
    config = GenerationConfig.from_dict(
        {"stop": "。", "top_k": 5, "forced_ids": {0: 3}, "eos_token_id": 102, "seed": 7}
    )
    assert GenerationConfig.from_dict(config.to_dict()) == config
    assert GenerationConfig().to_dict() == {}


def test_defaults_come_from_the_models_file(
    model: GPT2ML, tokenizer: Tokenizer, tmp_path: Any
) -> None:
    path = tmp_path / "model.safetensors"
    defaults = GenerationConfig(stop=("。",), top_k=5, max_new_tokens=7)
    model.float().save_pretrained(path, tokenizer=tokenizer, generation=defaults.to_dict())
    model.double()
    assert Generator.from_pretrained(path, compile=False).defaults == defaults
    loaded = Generator(GPT2ML.from_pretrained(path), tokenizer, compile=False)
    assert loaded.defaults == defaults
    assert len(loaded.complete("今", seed=0, stop=())[0].token_ids) == 7
