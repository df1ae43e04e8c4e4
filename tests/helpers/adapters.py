"""LoRA adapters with loud random weights, in the format that peft saves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.modelfile.format import expected_shapes

KINDS = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")


def write_adapter(
    model: Path, folder: Path, *, rank: int = 4, targets: Sequence[str] = KINDS, seed: int = 0
) -> Path:
    """An adapter of a model file that changes what it writes; gives the folder."""
    draw = torch.Generator().manual_seed(seed)
    with ModelFile.open(model) as file:
        shapes = expected_shapes(file.config)
    tensors = {}
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        if parameter != "weight" or not module.endswith(tuple(targets)):
            continue
        a = torch.randn(rank, shape[1], generator=draw) * shape[1] ** -0.5
        b = torch.randn(shape[0], rank, generator=draw) * 0.1
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    folder.mkdir()
    settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
