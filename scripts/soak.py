"""Load a server with many clients for minutes: every text must be right, and no resource may leak.

    python -m scripts.soak --clients 64 --seconds 300 [--model out.safetensors]

The server runs in a process of its own. Each request is first answered alone. Then the clients send
the requests at random, streamed and whole, and disconnect from about a third of them. Every
complete text must be the one that was written alone. The server's memory, threads and open files
are printed every ten seconds; growth after the first minute would be a leak.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import random
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from scripts.attacks.tools import CHECKPOINT, ServedModel, convert

LEAVING = 0.35  # share of the requests whose client disconnects
ANSWER_SECONDS = 300.0
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0},
    {"top_k": 5, "stop": ["。", "，"]},
    {"top_p": 0.9, "logprobs": 3},
    {"n": 2, "temperature": 1.3, "min_p": 0.02},
    {"presence_penalty": 1, "frequency_penalty": 0.5, "user": "soak"},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    {"echo": True, "logprobs": 0},
)


@dataclasses.dataclass
class Counts:
    """The outcomes of the clients' requests."""

    right: int = 0
    left: int = 0
    tokens: int = 0
    findings: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Usage:
    """The server's resources at one time."""

    seconds: float
    megabytes: float
    threads: int
    files: int


def requests(draw: random.Random, count: int) -> list[dict[str, Any]]:
    """Requests of many lengths; some prompts share their beginning."""
    characters = "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少床前明月光疑是地上霜"
    shared = "".join(draw.choices(characters, k=400))
    made = []
    for number in range(count):
        length = draw.choice((2, 5, 20, 100, 700))
        prompt = "".join(draw.choices(characters, k=length))
        made.append(
            {
                "prompt": shared + prompt if draw.random() < 0.2 else prompt,
                "max_tokens": draw.choice((1, 8, 32, 100, 300)),
                "seed": number,
                **OPTIONS[number % len(OPTIONS)],
            }
        )
    return made


class Served(ServedModel):
    """A server whose use of resources can be read."""

    def __init__(self, model: Path, *options: str) -> None:
        super().__init__(model, *options)
        self._began = time.monotonic()

    def usage(self) -> Usage:
        folder = Path(f"/proc/{self.process.pid}")
        status = dict(
            line.split(":", 1) for line in (folder / "status").read_text().splitlines() if line
        )
        return Usage(
            seconds=time.monotonic() - self._began,
            megabytes=int(status["VmRSS"].split()[0]) / 1024,
            threads=int(status["Threads"]),
            files=len(list((folder / "fd").iterdir())),
        )

    def texts_under_way(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        found = re.findall(r"^gpt2ml_(?:running_rows|queued_texts) (\S+)$", text, re.MULTILINE)
        return int(sum(map(float, found)))


def ask(port: int, body: dict[str, Any], *, leave_after: float | None = None) -> list[str] | None:
    """The texts of a request, or None if the client disconnected.

    With `leave_after`, it does so after that many seconds or, streaming, 20 times as many events.
    """
    timeout = ANSWER_SECONDS if leave_after is None or body.get("stream") else leave_after
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {response.read()[:200]!r}")
        if not body.get("stream"):
            return [choice["text"] for choice in json.loads(response.read())["choices"]]
        texts = [""] * body.get("n", 1)
        events = 0
        for line in response:
            if line.startswith(b"data: [DONE]"):
                return texts
            if line.startswith(b"data: "):
                events += 1
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] += choice["text"]
            if leave_after is not None and events > 20 * leave_after:
                return None
        raise ValueError("the stream ended without [DONE]")
    except TimeoutError:
        if leave_after is None:
            raise
        return None
    finally:
        connection.close()


def client(
    port: int, known: list[tuple[dict[str, Any], list[str]]], seed: int, end: float, counts: Counts
) -> None:
    """Send random requests until `end`, and count their outcomes."""
    draw = random.Random(seed)
    while time.monotonic() < end:
        body, expected = draw.choice(known)
        body = {**body, "stream": draw.random() < 0.6}
        leave_after = draw.uniform(0.01, 3) if draw.random() < LEAVING else None
        try:
            texts = ask(port, body, leave_after=leave_after)
        except Exception as error:
            counts.findings.append(f"{body}: {error!r}")
            continue
        if texts is None:
            counts.left += 1
        elif texts == expected:
            counts.right += 1
            counts.tokens += sum(map(len, texts))
        else:
            counts.findings.append(f"{body}: another text than alone: {texts} {expected}")


def soak(server: Served, clients: int, seconds: float, seed: int) -> tuple[Counts, list[Usage]]:
    """Run the clients; returns their outcomes and the server's resources over time."""
    draw = random.Random(seed)
    known = [(body, ask(server.port, body) or []) for body in requests(draw, 64)]
    counts, usages = Counts(), [server.usage()]
    end = time.monotonic() + seconds
    threads = [
        threading.Thread(target=client, args=(server.port, known, number, end, counts))
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        time.sleep(min(10.0, max(end - time.monotonic(), 0.1)))
        usages.append(server.usage())
    for thread in threads:
        thread.join()
    end = time.monotonic() + 30
    while server.texts_under_way() and time.monotonic() < end:
        time.sleep(0.1)
    if under_way := server.texts_under_way():
        counts.findings.append(f"{under_way} texts hold rows, though no client waits for them")
    time.sleep(1)
    usages.append(server.usage())
    counts.findings += [line for line in server.log if "Traceback" in line]
    return counts, usages


def main() -> int:
    parser = argparse.ArgumentParser(description="Load a server with many clients for minutes.")
    parser.add_argument("--clients", type=int, default=64, help="at once (default: 64)")
    parser.add_argument("--seconds", type=float, default=300.0, help="default: 300")
    parser.add_argument("--seed", type=int, default=0, help="of the random requests (default: 0)")
    parser.add_argument("--model", type=Path, help="model file (default: the shipped model)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            model = Path(folder) / "demo.safetensors"
            convert(CHECKPOINT, model)
        server = Served(model, "--max-queue", str(4 * arguments.clients))
        try:
            counts, usages = soak(server, arguments.clients, arguments.seconds, arguments.seed)
        finally:
            server.process.kill()
            server.process.wait()
    for usage in usages:
        print(
            f"{usage.seconds:6.0f} s  {usage.megabytes:7.1f} MB  {usage.threads:3} threads  "
            f"{usage.files:3} files"
        )
    print(
        f"{counts.right} answers as alone ({counts.tokens} characters), {counts.left} clients left,"
        f" {len(counts.findings)} findings"
    )
    for finding in counts.findings[:20]:
        print(finding)
    return 1 if counts.findings else 0


if __name__ == "__main__":
    sys.exit(main())
