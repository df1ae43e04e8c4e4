"""A real server process and real clients: OpenAI's, curl, and hostile ones."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

from gpt2ml_torch import Generator
from tests.helpers.server import ServerProcess, serving

PROMPT = "春眠不觉晓"


def ask(
    server: ServerProcess,
    path: str,
    body: Any = None,
    *,
    headers: dict[str, str] | None = None,
    timeout: float = 60,
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON and headers of a response; `body` bytes are sent as they are."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **(headers or {})}
    request = Request(server.url + path, data=data, headers=given)
    try:
        with urlopen(request, timeout=timeout) as response:
            text, status, found = response.read(), response.status, dict(response.headers)
    except HTTPError as error:
        text, status, found = error.read(), error.code, dict(error.headers)
    kind = found.get("content-type", "")
    return status, json.loads(text) if "json" in kind else text.decode(), found


def complete(server: ServerProcess, **body: Any) -> Any:
    status, answer, _ = ask(server, "/v1/completions", {"prompt": PROMPT, **body})
    assert status == 200, answer
    return answer


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Any:
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


# -- clients --------------------------------------------------------------------------------------


def test_openais_client_gets_the_generators_text(client: Any, generator: Generator) -> None:
    expected = generator.generate(
        PROMPT, return_full_text=False, seed=1, max_new_tokens=12, top_k=5
    )
    answer = client.completions.create(
        model="demo", prompt=PROMPT, seed=1, max_tokens=12, extra_body={"top_k": 5}
    )
    assert answer.choices[0].text == expected[0]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_openais_client_streams(client: Any) -> None:
    options = {"model": "demo", "prompt": PROMPT, "seed": 2, "max_tokens": 10, "n": 2}
    whole = client.completions.create(**options)
    texts, usage = ["", ""], None  # type: tuple[list[str], Any]
    for event in client.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        for choice in event.choices:
            texts[choice.index] += choice.text
        usage = event.usage or usage
    assert texts == [choice.text for choice in whole.choices]
    assert usage.completion_tokens == 20


def test_openais_asynchronous_client_asks_many_at_once(server: ServerProcess) -> None:
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(model="demo", prompt=PROMPT, seed=i % 4, max_tokens=8)
                    for i in range(32)
                )
            )
        return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(main())
    assert texts == texts[:4] * 8


def test_openais_client_lists_the_model_and_gets_its_errors(client: Any) -> None:
    import openai

    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.completions.create(model="gpt-4", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="base model"):
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "你好"}])
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        client.embeddings.create(model="demo", input="x")


def test_curl_streams_events_that_end_with_done(server: ServerProcess) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 3, "stream": True})
    done = subprocess.run(
        ["curl", "-sN", "--json", body, f"{server.url}/v1/completions"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    events = done.stdout.split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


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
    assert all(len(top) == 3 for top in logprobs["top_logprobs"])
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
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["gpt2ml_completion_tokens_total"]) >= 3
    assert float(values["gpt2ml_running_rows"]) >= 0
    assert float(values["gpt2ml_time_to_first_token_seconds_count"]) >= 1


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
    ):
        found, answer, _ = ask(server, path, body)
        assert found == status, answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_a_foreign_host_or_origin_or_type_is_refused(server: ServerProcess) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1}
    for headers, status in (
        ({"Host": "evil.example"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Origin": server.url}, 200),
    ):
        assert ask(server, "/v1/completions", body, headers=headers)[0] == status
    assert "access-control-allow-origin" not in ask(server, "/health")[2]


def test_paths_do_not_reach_the_file_system(server: ServerProcess) -> None:
    for path in ("/../setup.cfg", "/page.js/../../app.py", "/%2e%2e/app.py", "//etc/passwd"):
        assert ask(server, path)[0] in (404, 421)


def test_a_key_is_asked_for_and_prompts_are_not_logged(shipped_model: Path) -> None:
    with serving(shipped_model, environment={"GPT2ML_API_KEY": "secret"}) as server:
        body = {"prompt": PROMPT, "max_tokens": 2}
        for key, status in ((None, 401), ("wrong", 401), ("secret", 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            found, answer, _ = ask(server, "/v1/completions", body, headers=headers)
            assert found == status, answer
        assert ask(server, "/health")[0] == 200
        assert ask(server, "/")[0] == 200
        assert ask(server, "/metrics")[0] == 401
        assert server.terminate() == 0
        log = "".join(server.log)
        assert "only this machine can ask" in log
        assert PROMPT not in log
        assert "secret" not in log


# -- clients that go, and the end -----------------------------------------------------------------


def connect(server: ServerProcess) -> socket.socket:
    parts = urlsplit(server.url)
    assert parts.port is not None
    return socket.create_connection((parts.hostname or "", parts.port), timeout=30)


def post(body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + data


def rows_in_use(server: ServerProcess) -> float:
    text = ask(server, "/metrics")[1]
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(("gpt2ml_running_rows ", "gpt2ml_queued_texts "))
    )


def wait_until_idle(server: ServerProcess) -> None:
    end = time.monotonic() + 20
    while rows_in_use(server):
        assert time.monotonic() < end, "a row was not freed"
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(server: ServerProcess, stream: bool) -> None:
    with connect(server) as sock:
        sock.sendall(post({"prompt": PROMPT, "max_tokens": 4000, "stream": stream}))
        if stream:
            assert sock.recv(100)
        else:
            time.sleep(0.2)
        assert rows_in_use(server) == 1
    wait_until_idle(server)


def test_a_full_queue_answers_429_and_the_others_go_on(shipped_model: Path) -> None:
    with serving(shipped_model, "--max-rows", "1", "--max-queue", "1") as server:
        sockets = [connect(server) for _ in range(2)]
        for sock in sockets:
            sock.sendall(post({"prompt": PROMPT, "max_tokens": 4000, "stream": True}))
            time.sleep(0.3)
        status, answer, headers = ask(server, "/v1/completions", {"prompt": PROMPT})
        assert status == 429
        assert answer["error"]["type"] == "rate_limit_error"
        assert headers["retry-after"]
        for sock in sockets:
            sock.close()
        wait_until_idle(server)
        assert complete(server, max_tokens=2)


def test_sigterm_lets_streams_end_and_turns_new_requests_away(shipped_model: Path) -> None:
    with serving(shipped_model) as server, connect(server) as stream, connect(server) as late:
        stream.sendall(post({"prompt": PROMPT, "max_tokens": 1500, "stream": True}))
        received = stream.recv(200)
        ended: list[int] = []
        ending = threading.Thread(target=lambda: ended.append(server.terminate()))
        ending.start()
        time.sleep(0.3)
        late.sendall(post({"prompt": PROMPT}))
        assert b" 503 " in late.recv(200)
        while part := stream.recv(65536):
            received += part
        assert b"data: [DONE]" in received
        ending.join()
        assert ended == [0]


def test_a_killed_server_can_be_started_again(shipped_model: Path) -> None:
    for _ in range(2):
        with serving(shipped_model) as server, connect(server) as stream:
            stream.sendall(post({"prompt": PROMPT, "max_tokens": 1500, "stream": True}))
            assert stream.recv(100)
            server.kill()


def test_a_port_in_use_is_one_line(server: ServerProcess, shipped_model: Path) -> None:
    port = urlsplit(server.url).port
    from gpt2ml_torch.__main__ import main

    assert main(["serve", str(shipped_model), "--port", str(port)]) == 2
