"""Damaged bytes in a model file: refused, or exactly the same weights."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from gpt2ml_torch import GPT2ML
from gpt2ml_torch.modelfile import ModelFile
from scripts.attacks.tools import ALLOWED, damaged, write_model


class Attack:
    def __init__(self, folder: Path) -> None:
        self._path = write_model(folder / "model.safetensors")
        self._data = self._path.read_bytes()
        self._weights = GPT2ML.from_pretrained(self._path).state_dict()
        self._weights = {name: tensor.clone() for name, tensor in self._weights.items()}

    def __call__(self, draw: random.Random) -> None:
        data = damaged(draw, self._data)
        self._path.write_bytes(data)
        try:
            with ModelFile.open(self._path) as file:
                file.verify()
                model = GPT2ML.from_file(file)
        except ALLOWED:
            return
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, self._weights[name]), f"{name} differs without a word"
