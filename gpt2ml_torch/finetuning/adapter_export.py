"""Convert a LoRA adapter trained here to one that peft loads on the exported class.

Query, key and value are joined here and have one adapter; in the exported class they have three.
The three share the first matrix, and each takes its rows of the second, so the change of the
weights is the same.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpt2ml_torch.export.names import exported_modules
from gpt2ml_torch.finetuning.adapter_config import plain_name
from gpt2ml_torch.finetuning.adapter_places import own_places
from gpt2ml_torch.finetuning.adapters import read_adapter, weight_changes
from gpt2ml_torch.modelfile import ModelFile

_PREFIX = "base_model.model."  # peft's prefix of the names of modules
_SHARED = ("lora_A.weight", "lora_embedding_A", "lora_embedding_B")  # not split by rows


def export_adapter(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
) -> None:
    """Write an adapter of `model` in peft's format for the class that `export_folder` exports.

    Raises `ValueError` for an adapter that does not fit the model, was not trained here, or holds
    whole weights or biases, and `OSError` if `folder` can't be written (`FileExistsError` if it
    exists).
    """
    found = read_adapter(adapter)
    with ModelFile.open(model) as file:
        places = own_places(file.config)
    try:
        weight_changes(found, places)  # raises unless every tensor has a place and its shape
        if found.config.modules_to_save or found.config.bias != "none" or found.config.lora_bias:
            raise ValueError("it holds whole weights or biases, which only `gpt2ml merge` takes")
    except ValueError as error:
        raise ValueError(f"the adapter {adapter} can't be exported: {error}") from None
    settings = json.loads((Path(adapter) / "adapter_config.json").read_bytes())
    targets = [name for name in places if places[name].adaptable and found.config.targets(name)]
    settings.update(_targets(found.config, targets))
    path = Path(folder)
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, f"{folder} exists already; give another name")
    if not path.absolute().parent.is_dir():
        raise OSError(
            errno.ENOENT, f"can't write {folder}: {path.parent} is not a folder; create it first"
        )
    _write(path, settings, _split(found.tensors))


def _write(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the folder under another name, and rename it when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
        text = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
        (partial / "adapter_config.json").write_text(text, encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _targets(config: Any, targets: list[str]) -> dict[str, Any]:
    """The settings that name modules, with the full exported name of each module."""
    ranks, alphas = {}, {}
    for name in targets:
        rank = config.rank_of(name)
        factor = rank**0.5 if config.rank_stabilized else rank
        for exported in exported_modules(name):
            ranks[exported], alphas[exported] = rank, config.scale_of(name) * factor
    return {
        "target_modules": sorted(ranks),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != config.alpha},
        "base_model_name_or_path": None,
    }


def _split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by peft's names for the exported class, split by rows where needed."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = plain_name(name).partition(".lora_")
        kind = f"lora_{kind}"
        names = exported_modules(module)
        shared = kind in _SHARED
        parts: Any = [tensor] * len(names) if shared else torch.chunk(tensor, len(names))
        for exported, part in zip(names, parts, strict=True):
            result[f"{_PREFIX}{exported}.{kind}"] = part.clone().contiguous()
    return result
