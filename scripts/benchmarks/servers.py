"""Start the servers to measure: ours, llama.cpp's and vLLM's, each in processes of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpt2ml_torch.config import GPT2MLConfig
from scripts.benchmarks.load import NEW_TOKENS, Server
from scripts.benchmarks.program import ROOT

READY_SECONDS = 180
SLOT_TOKENS = 128  # size of a llama.cpp slot, for a prompt and its continuation
VLLM_CACHE_GIB = 2


@contextlib.contextmanager
def ours(
    model: Path, rows: int, precision: str, log: Path, *, processes: int = 1, threads: int
) -> Iterator[Server]:
    """Our server, in one process or in several that share the threads."""
    command = [sys.executable, "-m", "gpt2ml_torch", "serve", str(model)]
    options = ["--max-rows", str(rows), "--quantize", precision, "--prefix-cache-tokens", "0"]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(threads // processes, 1)),
        "PYTHONPATH": str(ROOT),
    }
    urls = []
    with contextlib.ExitStack() as stack:
        for number in range(processes):
            port, own_log = free_port(), log.with_suffix(f".{number}.log")
            full = [*command, *options, "--port", str(port)]
            stack.enter_context(running(full, port, own_log, environment))
            urls.append(f"http://127.0.0.1:{port}/v1")
        name = "ours" if processes == 1 else f"ours, {processes} processes"
        yield Server(name, tuple(urls), {"min_tokens": NEW_TOKENS})


@contextlib.contextmanager
def llama_cpp(program: Path, gguf: Path, rows: int, threads: int, log: Path) -> Iterator[Server]:
    """llama.cpp's own server with a slot for each client."""
    port = free_port()
    command = [str(program), "-m", str(gguf), "--port", str(port), "-t", str(threads)]
    options = ["-np", str(rows), "-c", str(rows * SLOT_TOKENS)]
    with running([*command, *options], port, log):
        yield Server("llama.cpp", (f"http://127.0.0.1:{port}/v1",), {"ignore_eos": True})


@contextlib.contextmanager
def vllm(python: Path, folder: Path, rows: int, dtype: str, log: Path) -> Iterator[Server]:
    """vLLM with the exported folder; its environment must have this package, for the plugin."""
    port = free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    options += ["--served-model-name", "model", "--max-num-seqs", str(rows)]
    options += ["--enforce-eager", "--no-enable-prefix-caching"]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",  # by default it spares one
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)
    with running([*command, *options], port, log, environment):
        extra = {"ignore_eos": True, "model": "model"}
        yield Server("vLLM", (f"http://127.0.0.1:{port}/v1",), extra)


def write_gguf(path: Path, config: GPT2MLConfig, precision: str) -> None:
    """Write a GPT-2 of these dimensions for llama.cpp; needs the package `gguf`."""
    from scripts.benchmarks import peers

    peers.write_gguf(path, config, peers.GGUF_TYPES[precision])


def export(model: Path, folder: Path) -> None:
    """Write the folder that vLLM loads."""
    command = [sys.executable, "-m", "gpt2ml_torch", "export", str(model), str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def running(
    command: Sequence[str],
    port: int,
    log: Path,
    environment: dict[str, str] | None = None,
    *,
    seconds: float = READY_SECONDS,
) -> Iterator[None]:
    """Run a server; the block begins when it answers `/health`.

    Raises `RuntimeError` if it ends first or takes too long.
    """
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            # Python imports from this folder first; vLLM's must find the installed package.
            cwd=ROOT if environment is None else log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a group of its own, with the workers
        )
    try:
        _wait_until_ready(process, port, log, seconds)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            # The whole group: a worker that compiles does not notice that the server ended.
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_ready(
    process: subprocess.Popen[bytes], port: int, log: Path, seconds: float
) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.5)
    lines = log.read_text(errors="replace").strip().splitlines()
    errors = [line for line in lines if "ERROR" in line and "Error:" in line]
    raise RuntimeError(f"the server did not start: {''.join((errors or lines)[-1:])[-300:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
