"""Fine-tuning, whole or in pieces, each usable alone.

    result = finetune(FinetuneConfig(model="in.safetensors", data=("poems.txt",),
                                     out="out.safetensors"), callback=print)

`finetune` goes from files to a file. Its pieces: `tokenize_files`, `RowDataset` and `BatchStream`
(files to batches), `Objective` (the loss), the optimizers with `StepInBackward`, `Trainer` (the
loop), and `predict` (memory, before anything is loaded).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2ml_torch.finetuning.config import FinetuneConfig, TrainConfig
    from gpt2ml_torch.finetuning.data.batches import BatchStream
    from gpt2ml_torch.finetuning.data.cache import tokenize_files
    from gpt2ml_torch.finetuning.data.rows import RowDataset, Rows, next_token_rows
    from gpt2ml_torch.finetuning.memory import Prediction, predict
    from gpt2ml_torch.finetuning.objective import Objective
    from gpt2ml_torch.finetuning.optimizers import (
        Adafactor,
        AdamW,
        StepInBackward,
        parameter_groups,
    )
    from gpt2ml_torch.finetuning.optimizers.rounding import round_stochastically_
    from gpt2ml_torch.finetuning.reporting import Event
    from gpt2ml_torch.finetuning.run import FinetuneResult, finetune
    from gpt2ml_torch.finetuning.trainer import Trainer, TrainResult

# Imported when first used: the workers that tokenise need none of it.
_PLACES = {
    "Adafactor": "optimizers",
    "AdamW": "optimizers",
    "BatchStream": "data.batches",
    "Event": "reporting",
    "FinetuneConfig": "config",
    "FinetuneResult": "run",
    "Objective": "objective",
    "Prediction": "memory",
    "RowDataset": "data.rows",
    "Rows": "data.rows",
    "StepInBackward": "optimizers",
    "TrainConfig": "config",
    "TrainResult": "trainer",
    "Trainer": "trainer",
    "finetune": "run",
    "next_token_rows": "data.rows",
    "parameter_groups": "optimizers",
    "predict": "memory",
    "round_stochastically_": "optimizers.rounding",
    "tokenize_files": "data.cache",
}

__all__ = [
    "Adafactor",
    "AdamW",
    "BatchStream",
    "Event",
    "FinetuneConfig",
    "FinetuneResult",
    "Objective",
    "Prediction",
    "RowDataset",
    "Rows",
    "StepInBackward",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "finetune",
    "next_token_rows",
    "parameter_groups",
    "predict",
    "round_stochastically_",
    "tokenize_files",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
