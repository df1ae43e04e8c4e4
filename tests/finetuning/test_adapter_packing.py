"""Which adapters can be added beside packed weights; what others are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2ml_torch import GPT2ML
from gpt2ml_torch.finetuning import load_adapter
from tests.helpers.adapters import write_adapter


def with_settings(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def with_tensors(**shapes: tuple[int, ...]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        added = {
            f"base_model.model.{name.replace('__', '.')}": torch.ones(shape)
            for name, shape in shapes.items()
        }
        save_file(load_file(path) | added, path)

    return edit


def damaged(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def not_finite(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([damaged], "is damaged"),
        ([not_finite], "NaN or infinite"),
        ([with_settings(r=5)], "make it"),
        ([with_settings(peft_type="IA3")], "IA3"),
        ([with_settings(target_modules=["nothing"])], "names no layer"),
        (
            [
                with_settings(modules_to_save=["embedding_norm"]),
                with_tensors(embedding_norm__weight=(32,), embedding_norm__bias=(32,)),
            ],
            "embedding_norm.bias.*merge it into the model instead",
        ),
    ],
    ids=["truncated", "nan", "rank", "kind", "targets", "norms"],
)
def test_an_adapter_that_cannot_be_added_is_one_line(
    edits: list[Callable[[Path], None]], message: str, tuning_files: Path, tmp_path: Path
) -> None:
    model = tuning_files / "model.safetensors"
    folder = write_adapter(model, tmp_path / "adapter")
    for edit in edits:
        edit(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(folder, GPT2ML.from_pretrained(model))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_model_is_refused(
    tuning_files: Path, shipped_model: Path, tmp_path: Path
) -> None:
    folder = write_adapter(tuning_files / "model.safetensors", tmp_path / "adapter")
    with pytest.raises(ValueError, match="can't be added"):
        load_adapter(folder, GPT2ML.from_pretrained(shipped_model))


def test_dora_is_refused_with_the_way_to_merge_it(tuning_files: Path, tmp_path: Path) -> None:
    model = tuning_files / "model.safetensors"
    folder = write_adapter(model, tmp_path / "adapter", targets=["mlp.up"])
    with_settings(use_dora=True)(folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in list(tensors.items()):
        if name.endswith("lora_B.weight"):
            base = name.removesuffix("lora_B.weight")
            tensors[f"{base}lora_magnitude_vector"] = torch.ones(len(tensor))
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=r"more than a product of low rank; merge it .*gpt2ml merge"
    ):
        load_adapter(folder, GPT2ML.from_pretrained(model))


def test_an_adapter_that_was_never_trained_says_so(
    tuning_files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tuning_files / "model.safetensors"
    folder = write_adapter(model, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    zeroed = {
        name: torch.zeros_like(tensor) if "lora_B" in name else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(zeroed, path)
    load_adapter(folder, GPT2ML.from_pretrained(model))
    assert "adds nothing: all its products are zero" in caplog.text
