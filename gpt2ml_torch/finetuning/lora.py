"""LoRA through `peft`: an adapter put on a model's linear layers, saved, and merged into a file.

The layers may be plain or packed (`gpt2ml_torch.kernels`, int8 or int4): a packed layer is frozen
and lets gradients through. An adapter is always merged into plain weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2ml_torch.finetuning.config import LORA_TARGETS
from gpt2ml_torch.finetuning.quiet import quiet
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.modelfile import reader as checkpoint


def add_adapter(
    model: GPT2ML,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = LORA_TARGETS,
    dropout: float = 0.0,
) -> Any:
    """Freeze the model, put a float32 adapter on its linear layers, and give the `peft.PeftModel`.

    The model itself is changed in place and can go on being called; the PeftModel saves the
    adapter. `alpha` is twice the rank by default. Raises `ValueError` without peft (the extra
    `finetune`).
    """
    peft = _peft()
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 2 * rank,
        target_modules=list(targets),
        lora_dropout=dropout,
        bias="none",
    )
    with quiet():
        return peft.get_peft_model(model, settings)


def save_adapter(adapted: Any, folder: str | os.PathLike[str], *, base: str) -> None:
    """Save the adapter as peft does; `base` is the model file that it belongs to."""
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(str(folder), save_embedding_layers=False)


def merge_adapter(
    model_path: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    source: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the model with an adapter added to its weights, in the dtype of its file.

    `source` says where the weights come from (by default that of the model, and the adapter's
    name), `generation` holds defaults for `Generator` (by default the model's own). Raises
    `OSError` and `ValueError` for files that are missing or don't belong together.
    """
    peft = _peft()
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise OSError(
            f"{adapter} is no adapter: expected a folder with adapter_config.json and "
            "adapter_model.safetensors"
        )
    metadata = checkpoint.read_metadata(model_path)
    if metadata.quantization is not None:
        raise ValueError(
            f"{model_path} holds {metadata.quantization} weights, to which nothing can be added; "
            "give the file it was made from"
        )
    model = GPT2ML.from_pretrained(model_path)
    try:
        with quiet():
            merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the adapter {adapter} does not fit {model_path}: {reason}") from error
    checkpoint.save(
        out,
        merged.state_dict(),
        metadata.config,
        vocab=metadata.vocab,
        source=source or {**metadata.source, "merged_adapter": Path(adapter).name},
        generation=metadata.generation if generation is None else generation,
        overwrite=overwrite,
    )


def _peft() -> Any:
    try:
        with quiet():
            import peft
    except ImportError:
        raise ValueError(
            'LoRA needs the package peft: pip install "gpt2ml-torch[finetune]"'
        ) from None
    return peft
