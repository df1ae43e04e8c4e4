"""Optimizers: the original's Adafactor, AdamW, and updates inside the backward pass.

optimizer = Adafactor(parameter_groups(model), lr=1e-5)
in_backward = StepInBackward(optimizer)     # from now on loss.backward() updates the weights
"""

from gpt2ml_torch.finetuning.optimizers.adafactor import Adafactor
from gpt2ml_torch.finetuning.optimizers.adamw import AdamW
from gpt2ml_torch.finetuning.optimizers.groups import parameter_groups
from gpt2ml_torch.finetuning.optimizers.in_backward import StepInBackward, gradient_norm
from gpt2ml_torch.finetuning.optimizers.sliced import SlicedOptimizer
from gpt2ml_torch.finetuning.optimizers.slots import start_from

__all__ = [
    "Adafactor",
    "AdamW",
    "SlicedOptimizer",
    "StepInBackward",
    "gradient_norm",
    "parameter_groups",
    "start_from",
]
