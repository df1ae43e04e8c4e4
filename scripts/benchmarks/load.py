"""Closed-loop load on a completion server: each client sends a request when its last one ends.

The client uses asyncio's streams directly, because it shares the cores with the servers and must
not slow them down.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
import statistics
import time
from typing import Any
from urllib.parse import urlsplit

PROMPT_TOKENS, NEW_TOKENS = 32, 64


@dataclasses.dataclass(frozen=True)
class Server:
    """A server to measure."""

    name: str
    urls: tuple[str, ...]  # one for each process; clients are divided evenly among them
    extra: dict[str, Any]  # fields of its requests beside the prompt and the length


@dataclasses.dataclass
class _Seen:
    tokens: int = 0
    texts: int = 0
    first: list[float] = dataclasses.field(default_factory=list)  # seconds to a first token
    waiting: set[float] = dataclasses.field(default_factory=set)  # begun, nothing came yet


async def measure(server: Server, clients: int, seconds: float) -> dict[str, float | int]:
    """Tokens per second of all clients together, and times to the first token.

    All clients begin at once. A request without a token at the end counts with the time that it has
    waited, so the reported times may be too low, but not too high.
    """
    seen = _Seen()
    tasks = [asyncio.create_task(_client(server, number, seen)) for number in range(clients)]
    began = time.perf_counter()
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    took = time.perf_counter() - began
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()  # raises: a client ends only by an error
    first = sorted([*seen.first, *(time.perf_counter() - start for start in seen.waiting)])
    return {
        "tokens_per_second": seen.tokens / took,
        "texts": seen.texts,
        "first_token_median": statistics.median(first),
        "first_token_p99": first[math.ceil(0.99 * len(first)) - 1],
    }


async def _client(server: Server, number: int, seen: _Seen) -> None:
    draw, url = random.Random(number), server.urls[number % len(server.urls)]
    await asyncio.sleep(0)
    while True:
        ids = [draw.randrange(200, 4000) for _ in range(PROMPT_TOKENS)]
        await _request(server, url, ids, seed=draw.randrange(10**6), seen=seen)
        seen.texts += 1


async def _request(server: Server, url: str, ids: list[int], *, seed: int, seen: _Seen) -> None:
    body = {"prompt": ids, "max_tokens": NEW_TOKENS, "seed": seed, "stream": True, "top_k": 40}
    began = time.perf_counter()
    seen.waiting.add(began)
    reader, writer = await _post(url + "/completions", body | server.extra)
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{server.name}: {status!r} {(await reader.read(2000))[-500:]!r}")
        while (line := await reader.readline()) and line.strip() != b"data: [DONE]":
            if not line.startswith(b"data: "):
                continue
            choices = json.loads(line[6:]).get("choices")
            if choices and began in seen.waiting:
                seen.waiting.discard(began)
                seen.first.append(time.perf_counter() - began)
            # Each server sends an event for each token; a closing one may be empty.
            seen.tokens += bool(choices) and _is_token(choices[0])
    finally:
        writer.close()


def _is_token(choice: dict[str, Any]) -> bool:
    return bool(choice.get("text")) or choice.get("finish_reason") is None


async def _post(
    url: str, body: dict[str, Any]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    await writer.drain()
    return reader, writer
