"""Fine-tuning: the whole run, and parts that can be used on their own.

    result = finetune(FinetuneConfig(model="in.safetensors", data=("poems.txt",),
                                     out="out.safetensors"), callback=print)

`finetune` goes from files to a file. Its pieces: `tokenize_files`, `RowDataset` and `BatchStream`
(files to batches), `Objective` (the loss), the optimizers with `StepInBackward`, `Trainer` (the
loop) with its events, and `estimate_memory` (before anything is loaded).
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2ml_torch.finetuning.adapter_packing import load_adapter
    from gpt2ml_torch.finetuning.adapters import merge_adapter
    from gpt2ml_torch.finetuning.config import FinetuneConfig
    from gpt2ml_torch.finetuning.data.batches import BatchStream
    from gpt2ml_torch.finetuning.data.cache import tokenize_files
    from gpt2ml_torch.finetuning.data.rows import RowDataset, Rows, next_token_rows
    from gpt2ml_torch.finetuning.events import (
        CheckpointSaved,
        Evaluated,
        Event,
        PromptContinued,
        RunEnded,
        RunStarted,
        StepSkipped,
        StepTaken,
    )
    from gpt2ml_torch.finetuning.memory import MemoryEstimate, estimate_memory
    from gpt2ml_torch.finetuning.objective import Objective
    from gpt2ml_torch.finetuning.optimizers import (
        Adafactor,
        AdamW,
        StepInBackward,
        parameter_groups,
    )
    from gpt2ml_torch.finetuning.optimizers.rounding import round_stochastically_
    from gpt2ml_torch.finetuning.run import FinetuneResult, finetune
    from gpt2ml_torch.finetuning.train_config import TrainConfig
    from gpt2ml_torch.finetuning.trainer import Trainer, TrainResult

# Imported on first use: the worker processes that tokenise need none of it.
_PLACES = {
    "Adafactor": "optimizers",
    "AdamW": "optimizers",
    "BatchStream": "data.batches",
    "CheckpointSaved": "events",
    "Evaluated": "events",
    "Event": "events",
    "FinetuneConfig": "config",
    "FinetuneResult": "run",
    "MemoryEstimate": "memory",
    "Objective": "objective",
    "PromptContinued": "events",
    "RowDataset": "data.rows",
    "Rows": "data.rows",
    "RunEnded": "events",
    "RunStarted": "events",
    "StepInBackward": "optimizers",
    "StepSkipped": "events",
    "StepTaken": "events",
    "TrainConfig": "train_config",
    "TrainResult": "trainer",
    "Trainer": "trainer",
    "estimate_memory": "memory",
    "finetune": "run",
    "load_adapter": "adapter_packing",
    "merge_adapter": "adapters",
    "next_token_rows": "data.rows",
    "parameter_groups": "optimizers",
    "round_stochastically_": "optimizers.rounding",
    "tokenize_files": "data.cache",
}

# Names of version 0.1.0, to be removed one release after 0.2.
_RENAMED = {"Prediction": "MemoryEstimate", "predict": "estimate_memory"}

__all__ = [
    "Adafactor",
    "AdamW",
    "BatchStream",
    "CheckpointSaved",
    "Evaluated",
    "Event",
    "FinetuneConfig",
    "FinetuneResult",
    "MemoryEstimate",
    "Objective",
    "PromptContinued",
    "RowDataset",
    "Rows",
    "RunEnded",
    "RunStarted",
    "StepInBackward",
    "StepSkipped",
    "StepTaken",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "estimate_memory",
    "finetune",
    "load_adapter",
    "merge_adapter",
    "next_token_rows",
    "parameter_groups",
    "round_stochastically_",
    "tokenize_files",
]


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(
            f"{__name__}.{name} is now {new}; the old name will go",
            DeprecationWarning,
            stacklevel=2,
        )
        name = new
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
