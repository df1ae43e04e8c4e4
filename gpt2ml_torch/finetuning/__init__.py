"""Fine-tuning: data, loss, optimizers, LoRA and loop, each usable alone.

    result = finetune(FinetuneConfig(model="in.safetensors", data=("poems.txt",),
    out="out.safetensors"))

The pieces: `data` (files to rows), `optimizers` (a step inside the backward pass), `objective`,
`loop.Trainer`, `lora`,
`prediction` (memory before anything is loaded).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2ml_torch.finetuning.config import FinetuneConfig, TrainConfig
    from gpt2ml_torch.finetuning.loop import Trainer, TrainResult
    from gpt2ml_torch.finetuning.objective import Objective
    from gpt2ml_torch.finetuning.optimizers import (
        Adafactor,
        AdamW,
        StepInBackward,
        parameter_groups,
    )
    from gpt2ml_torch.finetuning.prediction import Prediction, predict
    from gpt2ml_torch.finetuning.reporting import Event
    from gpt2ml_torch.finetuning.rounding import round_stochastically_
    from gpt2ml_torch.finetuning.run import FinetuneResult, finetune

# Imported when first used: the workers that tokenise need none of it.
_PLACES = {
    "Adafactor": "optimizers",
    "AdamW": "optimizers",
    "Event": "reporting",
    "FinetuneConfig": "config",
    "FinetuneResult": "run",
    "Objective": "objective",
    "Prediction": "prediction",
    "StepInBackward": "optimizers",
    "TrainConfig": "config",
    "TrainResult": "loop",
    "Trainer": "loop",
    "finetune": "run",
    "parameter_groups": "optimizers",
    "predict": "prediction",
    "round_stochastically_": "rounding",
}

__all__ = [
    "Adafactor",
    "AdamW",
    "Event",
    "FinetuneConfig",
    "FinetuneResult",
    "Objective",
    "Prediction",
    "StepInBackward",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "finetune",
    "parameter_groups",
    "predict",
    "round_stochastically_",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
