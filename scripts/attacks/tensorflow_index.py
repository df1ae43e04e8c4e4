"""Damaged TensorFlow checkpoints: refused, or exactly the same weights."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch

from gpt2ml_torch import GPT2ML
from scripts.attacks.tools import ALLOWED, CHECKPOINT, convert, damaged


class Attack:
    def __init__(self, folder: Path) -> None:
        self._folder, self._out = folder / "checkpoint", folder / "out.safetensors"
        shutil.copytree(CHECKPOINT, self._folder)
        convert(self._folder, self._out)
        self._weights = {
            k: v.clone() for k, v in GPT2ML.from_pretrained(self._out).state_dict().items()
        }
        self._files = {
            path: path.read_bytes() for path in self._folder.iterdir() if path.suffix != ".md"
        }

    def __call__(self, draw: random.Random) -> None:
        path = draw.choice(list(self._files))
        if draw.random() < 0.6:
            path = next(file for file in self._files if file.suffix == ".index")
        path.write_bytes(damaged(draw, self._files[path]))
        self._out.unlink(missing_ok=True)
        try:
            convert(self._folder, self._out)
        except ALLOWED:
            assert not self._out.exists(), "an error left a file"
            return
        finally:
            path.write_bytes(self._files[path])
        for name, tensor in GPT2ML.from_pretrained(self._out).state_dict().items():
            assert torch.equal(tensor, self._weights[name]), f"{path.name}: {name} differs"
