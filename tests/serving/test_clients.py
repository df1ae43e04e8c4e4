"""A real server process and the clients that people have: OpenAI's, LangChain's and curl."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from typing import Any

import pytest

from gpt2ml_torch import Generator
from tests.helpers.server import PROMPT, ServerProcess


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Any:
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


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


def test_langchain_completes_and_streams(server: ServerProcess, generator: Generator) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    model = langchain.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="demo", max_tokens=12, seed=1, n=1
    )
    expected = generator.generate(PROMPT, return_full_text=False, seed=1, max_new_tokens=12)
    whole = model.bind(temperature=1).invoke(PROMPT)
    assert whole == expected[0]
    assert "".join(model.bind(temperature=1).stream(PROMPT)) == whole
