"""SIGKILL at random moments: the output file is complete, either the old one or the new one."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpt2ml_torch.modelfile import ModelFile
from scripts.attacks.tools import CHECKPOINT, ROOT, write_model


class Attack:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = write_model(folder / "model.safetensors")
        self._out = folder / "out.safetensors"
        self._old = self._model.read_bytes()
        (folder / "text.txt").write_text("春眠不觉晓。\n\n今天天气不错。\n" * 30, encoding="utf-8")
        out = ("--out", str(self._out), "--force")
        text = str(folder / "text.txt")
        self._commands: tuple[tuple[str, ...], ...] = (
            ("convert", str(CHECKPOINT), str(self._out), "--force"),
            ("gpt2ml_torch", "quantize", str(self._model), *out),
            ("gpt2ml_torch", "finetune", str(self._model), text, *out, "--steps", "3", "--quiet"),
        )

    def __call__(self, draw: random.Random) -> None:
        self._out.write_bytes(self._old)
        process = subprocess.Popen(
            [sys.executable, "-m", *draw.choice(self._commands)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(draw.uniform(0.05, 6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if hashlib.sha256(self._out.read_bytes()).digest() != hashlib.sha256(self._old).digest():
            with ModelFile.open(self._out) as file:
                file.verify()
