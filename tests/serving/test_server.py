"""What a real server process answers: responses, errors, and who may ask."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpt2ml_torch import Generator
from tests.helpers.server import PROMPT, ServerProcess, ask, complete, serving

# -- what a response holds ------------------------------------------------------------------------


def test_the_stop_string_is_left_out(server: ServerProcess, generator: Generator) -> None:
    (text,) = generator.generate(
        PROMPT, return_full_text=False, do_sample=False, stop=["。"], max_new_tokens=40
    )
    assert text.endswith("。")
    choice = complete(server, temperature=0, stop=["。"], max_tokens=40)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text.removesuffix("。"), "stop")


def test_prompts_and_samples_come_in_order(server: ServerProcess, generator: Generator) -> None:
    answer = complete(server, prompt=[PROMPT, "红"], n=2, seed=5, max_tokens=6)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in answer["choices"]]
    for first, prompt in ((0, PROMPT), (2, "红")):
        assert texts[first : first + 2] == generator.generate(
            prompt, num_return_sequences=2, return_full_text=False, seed=5, max_new_tokens=6
        )


def test_log_probabilities_have_openais_shape(server: ServerProcess) -> None:
    choice = complete(server, seed=1, max_tokens=5, logprobs=3)["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 5
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob
        assert len(top) in (3, 4)  # the token itself, where it is not among the three
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert max(logprobs["token_logprobs"]) <= 0


def test_an_echo_scores_the_prompt_as_the_generator_does(
    server: ServerProcess, generator: Generator
) -> None:
    (expected,) = generator.score(PROMPT)
    choice = complete(server, echo=True, max_tokens=0, logprobs=1)["choices"][0]
    assert choice["text"] == PROMPT
    first, *others = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert others == pytest.approx(list(expected.token_logprobs), rel=0.05, abs=0.05)
    both = complete(server, echo=True, max_tokens=4, seed=1)["choices"][0]["text"]
    assert both == PROMPT + complete(server, max_tokens=4, seed=1)["choices"][0]["text"]


def test_offsets_point_at_the_tokens_of_an_echo(server: ServerProcess) -> None:
    prompt = "Hello,  World 今天"
    choice = complete(server, prompt=prompt, echo=True, max_tokens=3, seed=1, logprobs=0)
    text, logprobs = choice["choices"][0]["text"], choice["choices"][0]["logprobs"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text[offset:].lower().startswith(token)


def test_a_temperature_next_to_zero_takes_the_best_token(server: ServerProcess) -> None:
    texts = [
        complete(server, temperature=temperature, seed=1)["choices"][0]["text"]
        for temperature in (0, 1e-320, 1e-45, 1e-38)
    ]
    assert len(set(texts)) == 1


def test_biases_and_penalties_are_obeyed(server: ServerProcess, generator: Generator) -> None:
    id_ = generator.tokenizer.encode("月")[0]
    text = complete(server, temperature=0, max_tokens=6, logit_bias={str(id_): 100})
    assert text["choices"][0]["text"] == "月" * 6
    options = {"temperature": 0, "max_tokens": 6, "logit_bias": {str(id_): 100}}
    text = complete(server, **options, presence_penalty=2, frequency_penalty=2)
    assert text["choices"][0]["text"].startswith("月月")


def test_text_becomes_ids_and_text_again(server: ServerProcess) -> None:
    _, answer, _ = ask(server, "/tokenize", {"prompt": PROMPT})
    assert answer["count"] == len(answer["tokens"]) == 5
    _, answer, _ = ask(server, "/detokenize", {"tokens": answer["tokens"]})
    assert answer == {"prompt": PROMPT}


def test_health_and_metrics_say_how_it_goes(server: ServerProcess) -> None:
    assert ask(server, "/health")[:2] == (200, {"status": "ok"})
    complete(server, max_tokens=3)
    _, text, headers = ask(server, "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    from prometheus_client.parser import text_string_to_metric_families

    families = list(text_string_to_metric_families(text))
    assert all(family.documentation for family in families)
    values = {sample.name: sample.value for family in families for sample in family.samples}
    assert values["gpt2ml_completion_tokens_total"] >= 3
    assert values["gpt2ml_prompt_tokens_total"] >= 5
    assert values["gpt2ml_cached_prompt_tokens_total"] >= 0
    assert values["gpt2ml_running_rows"] >= values["gpt2ml_queued_texts"] == 0
    assert values["gpt2ml_time_to_first_token_seconds_count"] >= 1
    assert values["gpt2ml_requests_total"] >= 1


# -- who may ask, and how -------------------------------------------------------------------------


def test_errors_have_openais_shape(server: ServerProcess) -> None:
    for path, body, status in (
        ("/v1/completions", b"{", 400),
        ("/v1/completions", b'{"prompt": NaN}', 400),
        ("/v1/completions", b"[" * 100_000, 400),
        ("/v1/completions", b"\xff", 400),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": "x"}, 400),
        ("/v1/completions", b"x" * (11 << 20), 413),
        ("/nothing", None, 404),
        ("/v1/completions", None, 405),
        ("/v1/models/other", None, 404),
        ("/v1/models/other/one", None, 404),
        ("/" + "a" * 20_000, None, 431),
    ):
        found, answer, _ = ask(server, path, body)
        assert found == status, answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_a_foreign_host_or_origin_or_type_is_refused(server: ServerProcess) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1}
    for headers, status in (
        ({"Host": "evil.example"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Encoding": "gzip"}, 415),
        ({"X": "y" * 20_000}, 431),
        ({"Content-Type": "text/plain"}, 415),
        ({"Origin": server.url}, 200),
    ):
        assert ask(server, "/v1/completions", body, headers=headers)[0] == status
    assert "access-control-allow-origin" not in ask(server, "/health")[2]


def test_paths_do_not_reach_the_file_system(server: ServerProcess) -> None:
    for path in ("/../setup.cfg", "/page.js/../../app.py", "/%2e%2e/app.py", "//etc/passwd"):
        assert ask(server, path)[0] in (404, 421)


def test_requests_at_once_never_see_each_others_texts(server: ServerProcess) -> None:
    prompts = [f"{character}{PROMPT}" for character in "红白青黄黑花风雪"]
    options = {"max_tokens": 24, "echo": True, "logprobs": 0, "seed": 3}
    alone = [complete(server, prompt=prompt, **options) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        asked = pool.map(lambda prompt: complete(server, prompt=prompt, **options), prompts)
        together = list(asked)
    assert [answer["choices"][0]["text"] for answer in together] == [
        answer["choices"][0]["text"] for answer in alone
    ]
    assert len({answer["id"] for answer in (*alone, *together)}) == 2 * len(prompts)


def test_a_key_is_asked_for_and_prompts_are_not_logged(shipped_model: Path) -> None:
    with serving(shipped_model, environment={"GPT2ML_API_KEY": "secret"}) as server:
        body = {"prompt": PROMPT, "max_tokens": 2}
        for key, status in ((None, 401), ("wrong", 401), ("secret", 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            found, answer, _ = ask(server, "/v1/completions", body, headers=headers)
            assert found == status, answer
        for scheme in ("bearer secret", "BEARER  secret"):
            assert ask(server, "/v1/models", headers={"Authorization": scheme})[0] == 200
        for scheme in ("Basic secret", "secret", "Bearer", "Bearer secret x", "Bearer Secret"):
            assert ask(server, "/v1/models", headers={"Authorization": scheme})[0] == 401
        headers = {"Authorization": "Bearer secret"}
        for wrong in ({"prompt": PROMPT * 300}, {"prompt": PROMPT, "stop": PROMPT * 90}, [PROMPT]):
            ask(server, "/v1/completions", wrong, headers=headers)  # cut, refused, refused
        assert ask(server, "/health")[0] == 200
        assert ask(server, "/")[0] == 200
        assert ask(server, "/metrics")[0] == 401
        assert server.terminate() == 0
        log = "".join(server.log)
        assert "only this machine can ask" in log
        assert PROMPT not in log
        assert "secret" not in log
