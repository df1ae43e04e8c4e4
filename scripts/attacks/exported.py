"""Exported folders, damaged or edited: converted back exactly, or one line of error.

Some cases run `check` on a damaged model file, which must not pass.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch

from gpt2ml_torch import GPT2ML
from gpt2ml_torch.export.folder import ExportOptions, export_folder
from scripts.attacks.tools import ALLOWED, any_json, convert, damaged, run_command, write_model

_CHECKED = 0.1  # share of cases that run `check`, which takes seconds


class Attack:
    def __init__(self, folder: Path) -> None:
        self._model = write_model(folder / "model.safetensors")
        self._data = self._model.read_bytes()
        self._damaged = folder / "damaged.safetensors"
        self._weights = {
            name: tensor.clone()
            for name, tensor in GPT2ML.from_pretrained(self._model).state_dict().items()
        }
        self._sound = export_folder(self._model, folder / "sound", ExportOptions())
        self._folder, self._out = folder / "exported", folder / "out.safetensors"

    def __call__(self, draw: random.Random) -> None:
        if draw.random() < _CHECKED:
            self._check(draw)
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(self._sound, self._folder)
        path = draw.choice(sorted(path for path in self._folder.iterdir() if path.is_file()))
        if path.suffix == ".json" and draw.random() < 0.7:
            values = json.loads(path.read_text(encoding="utf-8"))
            values[draw.choice([*values, "new"])] = any_json(draw)
            path.write_text(json.dumps(values), encoding="utf-8")
        elif draw.random() < 0.2:
            path.unlink()
        else:
            path.write_bytes(damaged(draw, path.read_bytes()))
        self._out.unlink(missing_ok=True)
        try:
            convert(self._folder, self._out)
        except ALLOWED:
            assert not self._out.exists(), f"{path.name}: an error left a file"
            return
        if path.suffix == ".safetensors":  # the folder's weights have no checksums
            return
        for name, tensor in GPT2ML.from_pretrained(self._out).state_dict().items():
            assert torch.equal(tensor, self._weights[name]), f"{path.name}: {name} differs"

    def _check(self, draw: random.Random) -> None:
        data = damaged(draw, self._data) if draw.random() < 0.8 else draw.randbytes(500)
        self._damaged.write_bytes(data)
        status, text = run_command(["check", str(self._damaged), "--no-precisions"])
        assert status in (0, 1, 2), f"status {status}: {text[-300:]}"
        assert status != 0 or data == self._data, "a damaged file passed"
