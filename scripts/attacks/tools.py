"""Shared parts of the attacks: damaged bytes, random JSON, a tiny model, commands and a server."""

from __future__ import annotations

import contextlib
import io
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from convert import to_safetensors
from convert.inputs import locate
from convert.plan import Options
from gpt2ml_torch import GPT2ML, GPT2MLConfig, Tokenizer
from gpt2ml_torch.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "checkpoints" / "demo"
ALLOWED = (ValueError, OSError)  # exceptions that the library may raise for bad input
TOKENS = [
    *("[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *"今天气不错春眠觉晓。，",
]
CONFIG = GPT2MLConfig(
    vocab_size=len(TOKENS),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=24,
)


def write_model(path: Path) -> Path:
    """A model file of 40 KB with a vocabulary."""
    torch.manual_seed(0)
    GPT2ML(CONFIG).save_pretrained(path, tokenizer=Tokenizer(TOKENS), source={"name": "attack"})
    return path


class ServedModel:
    """A `gpt2ml serve` in a process of its own, from when it listens on; `log` grows meanwhile."""

    def __init__(self, model: Path, *options: str) -> None:
        command = [sys.executable, "-m", "gpt2ml_torch", "serve", str(model), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *options], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.log: list[str] = []
        for line in self.process.stderr:
            if found := re.search(r"listening on http://[^:]+:(\d+)/", line):
                self.port = int(found[1])
                break
        threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True).start()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def convert(source: Path, out: Path) -> None:
    """Convert with the standard options."""
    to_safetensors.convert(locate(source), out, Options(overwrite=True))


def run_command(words: list[str]) -> tuple[int, str]:
    """Run a `gpt2ml` command in this process; returns its status and its standard error.

    Raises `AssertionError` for a traceback, and for status 2 without an error in the last line.
    """
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = main(words)
    text = errors.getvalue()
    assert "Traceback" not in text, f"{words}: {text[-300:]}"
    if status == 2:
        last = text.rstrip("\n").rpartition("\n")[2]
        assert "error: " in last, f"{words}: {text[-300:]!r}"
    return status, text


def damaged(draw: random.Random, data: bytes) -> bytes:
    """The bytes after one to four random changes, such as flips, cuts and repetitions."""
    result = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        if not result:
            break
        place = draw.randrange(len(result))
        length = min(draw.choice((1, 1, 2, 4, 8, 64, 4096)), len(result) - place)
        kind = draw.randrange(7)
        if kind == 0:
            result[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            result[place : place + length] = draw.randbytes(length)
        elif kind == 2:
            del result[place : place + length]
        elif kind == 3:
            result[place:place] = result[place : place + length]
        elif kind == 4:
            del result[place:]
        elif kind == 5:
            result[place : place + length] = draw.choice((b"\x00", b"\xff", b"\x80")) * length
        else:
            size = draw.choice((1, 4, 8))
            number = draw.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)) % 2 ** (
                8 * size
            )
            result[place : place + size] = number.to_bytes(size, "little")
    return bytes(result)


def any_json(draw: random.Random, depth: int = 0) -> Any:
    """A random JSON value, often an extreme one."""
    kind = draw.randrange(8 if depth < 3 else 6)
    if kind == 0:
        return draw.choice((None, True, False))
    if kind == 1:
        return draw.choice((0, -1, 1, 7, 2**31, 2**63, 10**30, -(10**30)))
    if kind == 2:
        return draw.choice((0.5, -0.0, 1e308, 1e-308, 3.0))
    if kind in (3, 4):
        return "".join(
            draw.choice("a今\x00\x1b[31m\u2028\n\ufffd/..") for _ in range(draw.randrange(12))
        )
    if kind == 5:
        return "x" * draw.choice((0, 1, 1000, 100_000))
    if kind == 6:
        return [any_json(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {str(any_json(draw, 9)): any_json(draw, depth + 1) for _ in range(draw.randrange(4))}
