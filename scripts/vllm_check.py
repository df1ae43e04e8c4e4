"""Start vLLM's server on the exported model and check it; scripts/vllm-check calls this.

The environment of vLLM runs the server and scripts/vllm_client.py, this one exports the model and
says which texts are expected.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from convert.__main__ import main as convert
from gpt2ml_torch import Generator, Tokenizer
from gpt2ml_torch.export.folder import ExportOptions, export_folder

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("春眠不觉晓，", "千山鸟飞绝，", "今天天气不错", "双十一", "科学空间", "月", "一片孤城")
TOKENS = 24
STARTUP = 600  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, help="the Python of an environment with vLLM")
    parser.add_argument("--model", help="a model file (default: the shipped model, converted)")
    parser.add_argument(
        "--code", action="store_true", help="load the folder's code, not the plugin"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Path(arguments.model or folder / "demo.safetensors")
        if not arguments.model and convert([str(ROOT / "checkpoints/demo"), str(model)]):
            return 2
        exported = export_folder(model, folder / "exported", ExportOptions(code=arguments.code))
        (folder / "expected.json").write_text(json.dumps(_expected(model)), encoding="utf-8")
        with _server(arguments, exported) as url:
            client = [arguments.vllm, str(ROOT / "scripts/vllm_client.py"), url]
            return subprocess.run([*client, str(folder / "expected.json")], check=False).returncode


def _expected(model: Path) -> dict[str, object]:
    """What the server should answer, by `Generator` and `Tokenizer`."""
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
def _server(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(arguments.vllm, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder), "--served-model-name", "gpt2ml", "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "32"),
        *("--tensor-parallel-size", str(arguments.tensor_parallel_size)),
        *(["--trust-remote-code"] if arguments.code else []),
    ]
    # Elsewhere, so that Python finds the installed package and not this folder.
    log = folder.with_name("server.log")
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            cwd=folder.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(server, url, log)
        yield f"{url}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < STARTUP:
        if server.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            print(f"server ready after {time.monotonic() - began:.0f} s")
            return
        time.sleep(2)
    raise OSError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())
