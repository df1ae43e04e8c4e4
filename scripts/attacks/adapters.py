"""Edited and damaged adapters: merged into finite weights or added beside packed ones, or one line
of error and no file.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from gpt2ml_torch import Generator
from gpt2ml_torch.finetuning import load_adapter
from gpt2ml_torch.modelfile import ModelFile
from scripts.attacks.tools import ALLOWED, CONFIG, any_json, damaged, run_command, write_model

CONFIGURATION: dict[str, Any] = {
    "peft_type": "LORA", "task_type": None, "r": 4, "lora_alpha": 6, "lora_dropout": 0.0,
    "target_modules": ["mlp.up"], "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
    "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
    "inference_mode": True, "base_model_name_or_path": None,
}  # fmt: skip


class Attack:
    def __init__(self, folder: Path) -> None:
        self._model, self._out = write_model(folder / "model.safetensors"), folder / "out"
        self._folder = folder / "adapter"
        self._folder.mkdir()
        torch.manual_seed(1)
        self._tensors = {}
        for layer in range(CONFIG.num_hidden_layers):
            name = f"base_model.model.blocks.{layer}.mlp.up.lora_"
            self._tensors[f"{name}A.weight"] = torch.randn(4, CONFIG.hidden_size)
            self._tensors[f"{name}B.weight"] = torch.randn(CONFIG.intermediate_size, 4)
        self._packed = Generator.from_pretrained(self._model, quantize="int8")
        self._expected = self._packed.generate("今天", seed=0, max_new_tokens=4)
        self._write(CONFIGURATION, save(self._tensors))
        status, text = self._merge()
        assert status == 0, f"a sound adapter: {text}"

    def __call__(self, draw: random.Random) -> None:
        configuration: dict[str, Any] = dict(CONFIGURATION)
        tensors = dict(self._tensors)
        for _ in range(draw.randint(1, 3)):
            self._change(draw, configuration, tensors)
        data = save(tensors)
        if draw.random() < 0.3:
            data = damaged(draw, data)
        self._write(configuration, data)
        self._out.unlink(missing_ok=True)
        status, text = self._merge()
        assert status in (0, 2), f"status {status}: {text[-300:]}"
        assert self._out.exists() == (status == 0), f"status {status}: {text[-300:]}"
        if status == 0:
            with ModelFile.open(self._out) as file:
                file.verify()
                finite = all(tensor.isfinite().all() for tensor in file.state_dict().values())
            assert finite, f"{configuration}: not finite"
        if self._packed.engine.on_kernels:
            self._add(configuration)

    def _change(
        self, draw: random.Random, configuration: dict[str, Any], tensors: dict[str, torch.Tensor]
    ) -> None:
        kind = draw.randrange(4)
        if kind == 0:
            configuration[draw.choice([*configuration, "new"])] = any_json(draw)
        elif not tensors:
            return
        elif kind == 1:
            tensors.pop(draw.choice(list(tensors)))
        elif kind == 2:
            name = draw.choice(list(tensors))
            prefix = draw.choice(("module.", "_orig_mod.", "base_model.model.", "x.", "今."))
            tensors[prefix + name] = tensors.pop(name)
        else:
            name = draw.choice(list(tensors))
            rows, columns = draw.choice(((0, 4), (4, 0), (3, 5), (4, 32), (64, 4)))
            value = draw.choice((0.0, float("nan"), float("inf"), 1e38))
            tensors[name] = torch.full((rows, columns), value)

    def _write(self, configuration: dict[str, Any], data: bytes) -> None:
        text = json.dumps(configuration)
        (self._folder / "adapter_config.json").write_text(text, encoding="utf-8")
        (self._folder / "adapter_model.safetensors").write_bytes(data)

    def _add(self, configuration: dict[str, Any]) -> None:
        generator = Generator(self._packed.model, self._packed.tokenizer, pack=False)
        error = ""
        try:
            generator.add_adapter("a", load_adapter(self._folder, generator.model))
            generator.generate("今天", adapter="a", seed=0, max_new_tokens=4)
        except ALLOWED as refusal:
            error = str(refusal)
        assert "\n" not in error, f"{configuration}: {error}"
        text = generator.generate("今天", seed=0, max_new_tokens=4)
        assert text == self._expected, f"{configuration}: the text without it changed"

    def _merge(self) -> tuple[int, str]:
        return run_command(["merge", str(self._model), str(self._folder), "--out", str(self._out)])
