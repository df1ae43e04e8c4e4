"""LoRA through `peft`: add an adapter to a model's linear layers, and save it.

The layers may be plain or packed (`gpt2ml_torch.kernels`, int8 or int4): a packed layer is frozen
and lets gradients through. `finetuning.adapters` merges an adapter, always into plain weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from gpt2ml_torch.finetuning.optional import require, silenced
from gpt2ml_torch.finetuning.train_config import LORA_TARGETS
from gpt2ml_torch.model import GPT2ML


def add_adapter(
    model: GPT2ML,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = LORA_TARGETS,
    dropout: float = 0.0,
) -> Any:
    """Freeze the model, add a float32 adapter to its linear layers, return the `peft.PeftModel`.

    The model is changed in place and can still be called; the PeftModel saves the adapter.
    `alpha` is twice the rank by default. Raises `ValueError` without peft (the extra `finetune`).
    """
    peft = require("peft", "LoRA")
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 2 * rank,
        target_modules=list(targets),
        lora_dropout=dropout,
        bias="none",
    )
    with silenced():
        return peft.get_peft_model(model, settings)


def save_adapter(adapted: Any, folder: str | os.PathLike[str], *, base: str) -> None:
    """Save the adapter as peft does; `base` is the model file that it belongs to."""
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
