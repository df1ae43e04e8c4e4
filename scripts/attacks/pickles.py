"""Damaged .bin files: refused, or exactly the same weights where the format has checksums."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from gpt2ml_torch import GPT2ML
from scripts.attacks.tools import ALLOWED, CONFIG, TOKENS, convert, damaged


def community(model: GPT2ML) -> dict[str, torch.Tensor]:
    """The state dict under the community's names, matrices as (in, out)."""
    names = {
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
        "mlp_norm": "ln_1",
        "output_norm": "ln_2",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] != "blocks":
            short = {"token_embedding": "wte", "position_embedding": "wpe"}.get(
                parts[0], "emb_norm"
            )
            state[f"{short}.{parts[-1]}"] = tensor.clone()
            continue
        layer = names[".".join(parts[2:-1])]
        state[f"h.{parts[1]}.{layer}.{parts[-1]}"] = (
            tensor.t().contiguous() if tensor.ndim == 2 else tensor.clone()
        )
    return state


class Attack:
    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        model = GPT2ML(CONFIG)
        self._weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self._folder, self._out = folder, folder / "out.safetensors"
        (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()), encoding="utf-8")
        self._bin = folder / "pytorch_model.bin"
        self._data = {}
        for zipped in (True, False):
            torch.save(community(model), self._bin, _use_new_zipfile_serialization=zipped)
            self._data[zipped] = self._bin.read_bytes()
            convert(self._bin, self._out)
            self._check("undamaged")

    def __call__(self, draw: random.Random) -> None:
        zipped = draw.random() < 0.5
        self._bin.write_bytes(damaged(draw, self._data[zipped]))
        self._out.unlink(missing_ok=True)
        try:
            convert(self._bin, self._out)
        except ALLOWED:
            assert not self._out.exists(), "an error left a file"
            return
        if zipped:  # the legacy format has no checksum
            self._check("zip")

    def _check(self, what: str) -> None:
        for name, tensor in GPT2ML.from_pretrained(self._out).state_dict().items():
            assert torch.equal(tensor, self._weights[name]), (
                f"{what}: {name} differs without a word"
            )
