"""Throughput and time to first token of completion servers, by number of clients.

scripts/bench serving                                  # ours at the published size, int8
scripts/bench serving --url http://127.0.0.1:9000/v1   # and a server that runs already, in turns

Each client streams one request after the other: a prompt of 32 tokens, 64 new tokens. A peer
serves a GPT-2 of the same dimensions (llama.cpp's server) or the exported model (vLLM).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpt2ml_torch import Generator
from scripts.benchmarks.machine import describe
from scripts.benchmarks.program import ROOT
from scripts.benchmarks.weights import SIZES, prompt, write_random_model

PROMPT_TOKENS, NEW_TOKENS = 32, 64


@contextlib.contextmanager
def our_server(model: Path, rows: int, precision: str) -> Iterator[str]:
    """The base URL of a server of ours."""
    command = [sys.executable, "-m", "gpt2ml_torch", "serve", str(model), "--port", "0"]
    options = ["--max-rows", str(rows), "--quantize", precision, "--prefix-cache-tokens", "0"]
    process = subprocess.Popen([*command, *options], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = None
        for line in process.stderr:
            found = re.search(r"listening on (http://\S+)/", line)
            if found:
                url = found[1]
                break
        if url is None:
            raise RuntimeError(f"the server ended with status {process.wait()}")
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait(60)


async def measure(url: str, clients: int, requests: int) -> dict[str, float]:
    """Tokens per second over all clients, and times to the first token."""
    import openai

    first_tokens: list[float] = []
    tokens = 0
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=3600) as client:
        model = (await client.models.list()).data[0].id
        numbers = iter(range(clients * requests))

        async def one_client() -> None:
            nonlocal tokens
            for number in numbers:
                began = time.perf_counter()
                first = None
                stream = await client.completions.create(
                    model=model,
                    prompt=prompt(PROMPT_TOKENS + number)[number:],
                    max_tokens=NEW_TOKENS,
                    seed=number,
                    stream=True,
                )
                async for _ in stream:
                    first = first or time.perf_counter() - began
                tokens += NEW_TOKENS
                first_tokens.append(first or 0.0)

        began = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(clients)))
        seconds = time.perf_counter() - began
    ordered = sorted(first_tokens)
    return {
        "tokens_per_second": tokens / seconds,
        "first_token_median": statistics.median(ordered),
        "first_token_p99": ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)],
    }


def batch_rate(model: Path, batch: int, precision: str) -> float:
    """Tokens per second of `Generator` on as many equal texts, prompts included."""
    generator = Generator.from_pretrained(model, quantize=precision, batch_size=batch)
    texts = [prompt(PROMPT_TOKENS + row)[row:] for row in range(batch)]
    generator.generate(texts, max_new_tokens=4, seed=0)
    began = time.perf_counter()
    generator.generate(texts, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, seed=0)
    return batch * NEW_TOKENS / (time.perf_counter() - began)


def table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores; torch "
        f"{machine['torch']}. Size {result['size']}, {result['precision']}; prompts of "
        f"{PROMPT_TOKENS} tokens, {NEW_TOKENS} new tokens.",
        "",
        "| server | clients | tokens/s | of Generator's batch | first token, median s | p99 s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        batch = result["batches"].get(str(row["clients"]))
        share = f"{row['tokens_per_second'] / batch:.2f}" if batch and row["who"] == "ours" else ""
        lines.append(
            f"| {row['who']} | {row['clients']} | {row['tokens_per_second']:.1f} | {share} | "
            f"{row['first_token_median']:.2f} | {row['first_token_p99']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
    for who in dict.fromkeys(row["who"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["who"] == who]
        clients = [row["clients"] for row in rows]
        axes[0].plot(clients, [row["tokens_per_second"] for row in rows], "o-", label=who)
        axes[1].plot(clients, [row["first_token_median"] for row in rows], "o-", label=who)
    for axis, title in zip(
        axes, ("tokens/s, all clients", "median s to the first token"), strict=True
    ):
        axis.set(xlabel="clients", title=title, ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="mega")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="a peer")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "serving")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "machine": describe(),
        "size": arguments.size,
        "precision": arguments.precision,
        "rows": [],
        "batches": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.safetensors"
        write_random_model(model, SIZES[arguments.size](), torch.bfloat16)
        rows = max(arguments.clients)
        with our_server(model, rows, arguments.precision) as url:
            peers = {"ours": url} | dict(peer.split("=", 1) for peer in arguments.url)
            for clients in arguments.clients:
                for who, where in peers.items():
                    found = asyncio.run(measure(where, clients, arguments.requests))
                    result["rows"].append({"who": who, "clients": clients, **found})
                    print(who, clients, found, flush=True)
        for clients in arguments.clients:
            result["batches"][str(clients)] = batch_rate(model, clients, arguments.precision)
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + os.linesep)
    arguments.out.with_suffix(".md").write_text(table(result))
    plot(result, arguments.out.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main()
