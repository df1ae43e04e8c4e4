"""A completions request is checked field by field, whatever a stranger sends."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from gpt2ml_torch.generation import GenerationConfig
from gpt2ml_torch.serving.completions import CompletionRequest, Limits, parse_request
from gpt2ml_torch.serving.errors import APIError
from gpt2ml_torch.tokenizer import Tokenizer
from tests.helpers.properties import given, st

TOKENS = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENIZER = Tokenizer([*TOKENS, *"今天气不错。，"])
VOCAB_SIZE = 120


def parse(**body: Any) -> CompletionRequest:
    return parse_request(
        {"prompt": "今天", **body},
        limits=Limits(),
        tokenizer=TOKENIZER,
        vocab_size=VOCAB_SIZE,
        defaults=GenerationConfig(),
    )


def test_what_is_not_said_has_openais_defaults() -> None:
    request = parse()
    assert request.config.max_new_tokens == request.max_tokens == 16
    assert (request.config.temperature, request.config.top_p, request.config.top_k) == (1, 1, 0)
    assert (request.n, request.stream, request.echo, request.logprobs) == (1, False, False, None)


def test_null_is_the_same_as_nothing() -> None:
    names = ("max_tokens", "temperature", "stop", "seed", "n", "logprobs", "stream_options", "user")
    assert parse(**dict.fromkeys(names)) == parse()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("今天", ("今天",)),
        (["今天", "天气"], ("今天", "天气")),
        ([104, 105], ((104, 105),)),
        ([[104], [105, 106]], ((104,), (105, 106))),
    ],
)
def test_a_prompt_is_text_texts_ids_or_lists_of_ids(prompt: Any, prompts: Any) -> None:
    assert parse(prompt=prompt).prompts == prompts


def test_a_temperature_of_zero_takes_the_best_token() -> None:
    assert not parse(temperature=0).config.samples


_WRONG: dict[str, list[Any]] = {
    "prompt": [
        7,
        1.5,
        True,
        {},
        [],
        [[]],
        [True],
        ["今", 7],
        [-1],
        [VOCAB_SIZE],
        "",
        "  ",
        [[1.5]],
    ],
    "max_tokens": ["7", -1, 1.5, True, [], {}, 10**9, 0],
    "temperature": ["1", -0.1, True, [], {}, math.inf, 1e9],
    "top_p": ["1", 0, -1, 1.1, True, []],
    "n": ["2", 0, -1, 1.5, True, [], 10**6],
    "stream": ["true", 1, 0, [], {}],
    "stop": [7, True, {}, [7], [""], "", ["。"] * 17, "x" * 1000, [None]],
    "seed": ["7", 1.5, True, [], 2**65],
    "logprobs": ["5", True, -1, 1.5, 21, []],
    "echo": ["true", 1, []],
    "presence_penalty": ["1", True, 3, -3, []],
    "frequency_penalty": ["1", True, 3, -3, {}],
    "logit_bias": [
        7,
        [],
        "x",
        {"x": 1},
        {"-1": 1},
        {"5": "1"},
        {"5": 200},
        {"5": True},
        {"999": 1},
    ],
    "user": [7, True, []],
    "top_k": ["5", 1.5, True, -2],
    "min_p": ["0", 2, True],
    "typical_p": ["1", 0, 2],
    "repetition_penalty": ["1", 0, -1, True],
    "no_repeat_ngram_size": ["2", -1, 1.5, 10**9],
    "min_tokens": ["2", -1, 17, 1.5],
    "top_p_rule": ["other", 7, []],
    "num_beams": [2, "1", 0],
    "best_of": [2, "1", 0],
    "suffix": ["x", 7, 0, False, [], {}],
    "model": [7, []],
    "stream_options": [7, [], {"include_usage": True}, {"unknown": 1}],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in _WRONG.items() for value in values],
    ids=str,
)
def test_a_wrong_value_is_an_error_that_names_its_field(name: str, value: Any) -> None:
    with pytest.raises(APIError) as caught:
        parse(**{name: value})
    body = caught.value.body()["error"]
    assert caught.value.status == 400
    assert body["type"] == "invalid_request_error"
    assert body["param"] == name
    assert name in body["message"]
    assert len(body["message"]) < 400


def test_the_list_of_wrong_values_covers_every_field() -> None:
    from gpt2ml_torch.serving import completions

    assert {*completions._CONFIG_FIELDS, *completions._OTHER_FIELDS} == set(_WRONG)
    assert sum(map(len, _WRONG.values())) >= 100


def test_an_unknown_field_is_named_with_the_one_that_was_meant() -> None:
    with pytest.raises(APIError, match="'max_token'; did you mean max_tokens"):
        parse(max_token=5)


def test_a_body_that_is_no_object_is_refused() -> None:
    bodies: tuple[Any, ...] = (None, [], "x", 7)
    for body in bodies:
        with pytest.raises(APIError, match="expected a JSON object"):
            parse_request(
                body,
                limits=Limits(),
                tokenizer=TOKENIZER,
                vocab_size=VOCAB_SIZE,
                defaults=GenerationConfig(),
            )


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab今\n", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("a5-", max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(_WRONG)), _json, max_size=5))
def test_any_json_gives_a_request_or_an_api_error(body: dict[str, Any]) -> None:
    try:
        request = parse(**body)
    except APIError:
        return
    assert isinstance(request.config, GenerationConfig)


def test_what_the_model_file_bans_stays_banned() -> None:
    defaults = GenerationConfig(suppress_tokens=(104,), bad_words=("气",), top_k=3)
    request = parse_request(
        {"prompt": "今"},
        limits=Limits(),
        tokenizer=TOKENIZER,
        vocab_size=VOCAB_SIZE,
        defaults=defaults,
    )
    assert request.config.suppress_tokens == (104,)
    assert request.config.bad_words == ("气",)
    assert request.config.top_k == 0


def test_more_texts_than_one_request_may_have_are_refused() -> None:
    for count, n in itertools.product((1, 4, 16), (1, 4, 16)):
        body = {"prompt": ["今"] * count, "n": n}
        if count * n <= Limits().max_samples:
            assert parse(**body).n == n
        else:
            with pytest.raises(APIError, match="send several requests"):
                parse(**body)
