"""Throughput and time to first token of completion servers, by number of clients.

scripts/bench serving                                     # ours at the published size, int8
scripts/bench serving --llama-server llama-server         # and llama.cpp's (needs `gguf`)
scripts/bench serving --vllm-python vllm-env/bin/python   # and vLLM's, with this package in its
                                                          # environment

Each client streams one request after the other, a prompt of 32 random tokens and 64 new ones, for a
fixed time; all clients begin at once. llama.cpp serves a GPT-2 of the same dimensions with random
weights (its norms are in other places), and vLLM the exported model without quantisation. The
servers run side by side and are measured in turns. Results are written after each measurement, so
an interrupted run keeps them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gpt2ml_torch import Generator
from scripts.benchmarks import servers
from scripts.benchmarks.load import NEW_TOKENS, PROMPT_TOKENS, Server, measure
from scripts.benchmarks.machine import describe
from scripts.benchmarks.program import ROOT
from scripts.benchmarks.weights import SIZES, prompt, write_random_model

SECONDS = {1: 10.0, 8: 30.0, 32: 75.0}  # length of a measurement, by number of clients

Result = dict[str, Any]
ServerContext = contextlib.AbstractContextManager[Server]


def batch_rate(generator: Generator, batch: int) -> float:
    """Tokens per second of `Generator` on a batch of `batch` texts, including their prompts."""
    generator.batch_size = batch
    texts = [prompt(PROMPT_TOKENS + row)[row:] for row in range(batch)]
    began = time.perf_counter()
    generator.generate(
        texts, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, top_k=40, top_p=1.0, seed=0
    )
    return batch * NEW_TOKENS / (time.perf_counter() - began)


def start_servers(
    arguments: argparse.Namespace, model: Path, folder: Path, stack: contextlib.ExitStack
) -> tuple[list[Server], dict[str, str]]:
    """Start the servers; returns them, and the reason for each that did not start."""
    starts = {"ours": _ours}
    if arguments.llama_server:
        starts["llama.cpp"] = _llama_cpp
    if arguments.vllm_python:
        starts["vLLM"] = _vllm
    started: list[Server] = []
    absent: dict[str, str] = {}
    for name, start in starts.items():
        print(f"starting {name}", flush=True)
        try:
            started.append(stack.enter_context(start(arguments, model, folder)))
        except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
            absent[name] = str(error)
            print(f"{name}: {error}", flush=True)
    return started, absent


def _ours(arguments: argparse.Namespace, model: Path, folder: Path) -> ServerContext:
    return servers.ours(
        model.absolute(),
        max(arguments.clients),
        arguments.precision,
        folder / "ours.log",
        processes=arguments.processes,
        threads=torch.get_num_threads(),
    )


def _llama_cpp(arguments: argparse.Namespace, model: Path, folder: Path) -> ServerContext:
    gguf = arguments.gguf or folder / "model.gguf"
    if not gguf.exists():
        servers.write_gguf(gguf, SIZES[arguments.size](), arguments.precision)
    program, rows = arguments.llama_server.absolute(), max(arguments.clients)
    return servers.llama_cpp(program, gguf, rows, torch.get_num_threads(), folder / "llama.log")


def _vllm(arguments: argparse.Namespace, model: Path, folder: Path) -> ServerContext:
    exported = arguments.vllm_folder or folder / "exported"
    if not exported.exists():
        servers.export(model, exported)
    python, rows = arguments.vllm_python.absolute(), max(arguments.clients)
    log = folder / "vllm.log"
    return servers.vllm(python, exported.absolute(), rows, arguments.vllm_dtype, log)


def run(arguments: argparse.Namespace) -> Result:
    ends = time.monotonic() + 60 * arguments.minutes
    result: Result = {
        "machine": describe(),
        "size": arguments.size,
        "precision": arguments.precision,
        "vllm_dtype": arguments.vllm_dtype,
        "rows": [],
        "batches": {},
        "absent": {},
    }
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model = arguments.model
        if model is None:
            model = folder / "model.safetensors"
            write_random_model(model, SIZES[arguments.size](), torch.bfloat16)
        measure_batches(arguments, model, result)
        started, result["absent"] = start_servers(arguments, model, folder, stack)
        for clients in sorted(arguments.clients, key=lambda clients: clients != 8):
            for server in started:
                seconds = SECONDS.get(clients, 30.0) * arguments.scale
                if time.monotonic() + seconds > ends:
                    print(f"no time left for {server.name} with {clients} clients", flush=True)
                    continue
                try:
                    found = asyncio.run(measure(server, clients, seconds))
                except (OSError, RuntimeError, ValueError) as error:
                    result["absent"][server.name] = str(error)
                    print(f"{server.name}, {clients} clients: {error}", flush=True)
                    continue
                row = {"who": server.name, "clients": clients, "seconds": seconds, **found}
                result["rows"].append(row)
                print(row, flush=True)
                save(result, arguments.out)
    return result


def measure_batches(arguments: argparse.Namespace, model: Path, result: Result) -> None:
    generator = Generator.from_pretrained(model, quantize=arguments.precision)
    generator.generate(prompt(PROMPT_TOKENS), max_new_tokens=4, seed=0)
    for clients in arguments.clients:
        result["batches"][str(clients)] = batch_rate(generator, clients)
        print(f"Generator, batch {clients}: {result['batches'][str(clients)]:.1f}", flush=True)
    save(result, arguments.out)


def save(result: Result, out: Path) -> None:
    """Write the results so far as JSON, as a table and as a plot."""
    result["rows"].sort(key=lambda row: row["clients"])
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + os.linesep)
    out.with_suffix(".md").write_text(table(result))
    if result["rows"]:
        with contextlib.suppress(ImportError):
            plot(result, out.with_suffix(".png"))


def table(result: Result) -> str:
    machine = result["machine"]
    lines = [
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores; torch "
        f"{machine['torch']}. Size {result['size']}; ours and llama.cpp in {result['precision']}, "
        f"vLLM in {result['vllm_dtype']}. Prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new "
        "tokens, all clients and servers on this machine.",
        "",
        "| clients | server | tokens/s | ours is | first token, median s | p99 s |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    ours = {row["clients"]: row for row in result["rows"] if row["who"].startswith("ours")}
    for clients, rate in sorted((int(key), rate) for key, rate in result["batches"].items()):
        own = ours.get(clients, {}).get("tokens_per_second")
        share = f"{own / rate:.2f} ×" if own else ""
        lines.append(f"| {clients} | `Generator`, one batch | {rate:.1f} | {share} | | |")
        for row in result["rows"]:
            if row["clients"] != clients:
                continue
            rate_here = row["tokens_per_second"]
            other = own and not row["who"].startswith("ours") and rate_here
            lines.append(
                f"| {clients} | {row['who']} | {rate_here:.1f} | "
                f"{f'{own / rate_here:.1f} ×' if other else ''} | "
                f"{row['first_token_median']:.2f} | {row['first_token_p99']:.2f} |"
            )
    lines += [f"\n{who} was not measured: {why}" for who, why in result["absent"].items()]
    return "\n".join(lines) + "\n"


def plot(result: Result, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
    for who in dict.fromkeys(row["who"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["who"] == who]
        clients = [str(row["clients"]) for row in rows]
        (line,) = axes[0].plot(clients, [row["tokens_per_second"] for row in rows], "o-", label=who)
        color = line.get_color()
        medians = [row["first_token_median"] for row in rows]
        axes[1].plot(clients, medians, "o-", color=color, label=f"{who}, median")
        p99 = [row["first_token_p99"] for row in rows]
        axes[1].plot(clients, p99, "o:", color=color, label=f"{who}, p99")
    axes[0].set(xlabel="clients", title="tokens/s, all clients", ylim=(0, None))
    axes[1].set(xlabel="clients", title="seconds to the first token", yscale="log")
    for axis in axes:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="mega")
    parser.add_argument("--model", type=Path, help="a model file of that size; else one is made")
    parser.add_argument("--precision", default="int8", choices=["int8", "int4"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--processes", type=int, default=1, help="of our server")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's program of this name")
    parser.add_argument("--gguf", type=Path, help="what it serves; else one is made")
    parser.add_argument("--vllm-python", type=Path, help="the Python of vLLM's environment")
    parser.add_argument("--vllm-folder", type=Path, help="the exported model; else one is made")
    parser.add_argument("--vllm-dtype", default="float32")
    parser.add_argument("--minutes", type=float, default=9.5, help="begin no measurement after")
    parser.add_argument("--scale", type=float, default=1.0, help="of each measurement's seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "serving")
    print(table(run(parser.parse_args())))


if __name__ == "__main__":
    main()
