"""Start vLLM's server on the exported model and check it; scripts/vllm-check calls this.

vLLM's environment runs the server and scripts/vllm_client.py; this one exports the model and
computes the expected texts. `--full MODEL` instead measures the throughput of that model, exported
in bfloat16, and of `gpt2ml serve` on the file itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.__main__ import main as convert
from gpt2ml_torch import Generator, Tokenizer
from gpt2ml_torch.export.folder import ExportOptions, export_folder
from scripts.benchmarks import servers
from scripts.benchmarks.machine import describe

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("春眠不觉晓，", "千山鸟飞绝，", "今天天气不错", "双十一", "科学空间", "月", "一片孤城")
TOKENS = 24
STARTUP = 1800  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, help="the Python of an environment with vLLM")
    parser.add_argument("--model", help="a model file (default: the shipped model, converted)")
    parser.add_argument(
        "--code", action="store_true", help="load the folder's code, not the plugin"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="don't let vLLM compile the model")
    parser.add_argument("--full", metavar="MODEL", help="measure this model instead of checking")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8, 32], help="with --full: requests at once"
    )
    parser.add_argument(
        "--tokens", type=int, default=64, help="with --full: new tokens of a request"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends too
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.full:
            return _measure(arguments, folder)
        model = Path(arguments.model or folder / "demo.safetensors")
        if not arguments.model and convert([str(ROOT / "checkpoints/demo"), str(model)]):
            return 2
        exported = export_folder(model, folder / "exported", ExportOptions(code=arguments.code))
        (folder / "expected.json").write_text(json.dumps(_expected(model)), encoding="utf-8")
        with _server(arguments, exported, "float32") as url:
            client = [*_client(arguments, url), str(folder / "expected.json")]
            return subprocess.run(client, check=False).returncode


def _client(arguments: argparse.Namespace, url: str) -> list[str]:
    return [arguments.vllm, str(ROOT / "scripts/vllm_client.py"), url]


def _measure(arguments: argparse.Namespace, folder: Path) -> int:
    """Print a table of tokens per second, and what the export took."""
    export = [sys.executable, "-m", "gpt2ml_torch", "export", arguments.full, str(folder / "full")]
    began = time.monotonic()
    subprocess.run([*export, "--dtype", "bfloat16", "--no-code"], cwd=ROOT, check=True)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"exported in {seconds:.0f} s with a peak of {peak:.2f} GiB of memory", flush=True)
    rows: dict[str, dict[str, float]] = {}
    with _server(arguments, folder / "full", "bfloat16") as url:
        found = _rates(arguments, url)
        rows["vLLM, bfloat16"] = found["rates"]
    for precision in ("bfloat16", "int8"):
        log, threads = folder.with_name("ours.log"), os.cpu_count() or 1
        rows_wanted, model = max(arguments.batches), Path(arguments.full).absolute()
        with servers.ours(model, rows_wanted, precision, log, threads=threads) as server:
            rows[f"gpt2ml serve, {precision}"] = _rates(arguments, server.urls[0])["rates"]
    machine = describe()
    print(f"{machine['date']}, {machine['processor']}, {machine['cores']} cores")
    print(f"{found['versions']}; tokens per second, {arguments.tokens} new tokens a text\n")
    print("".join(f"| {head} " for head in ("", *arguments.batches)) + "|")
    print("|---|" + "---:|" * len(arguments.batches))
    for who, rates in rows.items():
        print("".join(f"| {cell} " for cell in (who, *(f"{r:.1f}" for r in rates.values()))) + "|")
    return 0


def _rates(arguments: argparse.Namespace, url: str) -> dict[str, Any]:
    batches = ["--rates", *map(str, arguments.batches), "--tokens", str(arguments.tokens)]
    command = [*_client(arguments, url), *batches]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    return dict(json.loads(done.stdout))


def _expected(model: Path) -> dict[str, object]:
    """The expected answers, computed by `Generator` and `Tokenizer`."""
    generator = Generator.from_pretrained(model, compile=False, quantize="float32")
    texts = generator.generate(list(PROMPTS), do_sample=False, max_new_tokens=TOKENS)
    tokenizer = Tokenizer.from_pretrained(model)
    return {
        "tokens": TOKENS,
        "texts": dict(zip(PROMPTS, texts, strict=True)),
        "ids": {prompt: tokenizer.encode(prompt) for prompt in PROMPTS},
        "banned": list(tokenizer.banned_ids),
    }


@contextlib.contextmanager
def _server(arguments: argparse.Namespace, folder: Path, dtype: str) -> Iterator[str]:
    port = servers.free_port()
    command = [
        *(arguments.vllm, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder), "--served-model-name", "gpt2ml", "--dtype", dtype),
        *("--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "32"),
        *("--tensor-parallel-size", str(arguments.tensor_parallel_size)),
        *("--pipeline-parallel-size", str(arguments.pipeline_parallel_size)),
        *(["--trust-remote-code"] if arguments.code else []),
        *(["--enforce-eager"] if arguments.eager else []),
    ]
    # Elsewhere, so that Python finds the installed package and not this folder.
    log = folder.with_name("server.log")
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    workers = arguments.tensor_parallel_size * arguments.pipeline_parallel_size
    if workers > 1:  # by default, vLLM needs a NUMA node for each
        cores = sorted(os.sched_getaffinity(0))
        shares = [cores[index::workers] or cores for index in range(workers)]
        bind = "|".join(",".join(map(str, share)) for share in shares)
        environment["VLLM_CPU_OMP_THREADS_BIND"] = bind
    began = time.monotonic()
    with servers.running(command, port, log, environment, seconds=STARTUP):
        print(f"server ready after {time.monotonic() - began:.0f} s")
        yield f"http://127.0.0.1:{port}/v1"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:  # printed if a server does not start
        sys.exit(f"scripts/vllm-check: {error}")
