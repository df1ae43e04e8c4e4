"""Adafactor's statistics from the file of a converted model: go on where its training stopped."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt2ml_torch.finetuning.optimizers.adafactor import Adafactor


@torch.no_grad()
def start_from(optimizer: Adafactor, module: nn.Module, slots: Mapping[str, Tensor]) -> None:
    """Take statistics by name, such as `blocks.0.mlp.up.weight.vr`, instead of zeros.

    `module` gives the parameters their names; frozen ones are left out. Raises
    `ValueError` where one is missing or has another shape.
    """
    optimizer.allocate()
    for name, parameter in module.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            key = f"{name}.{slot}"
            found = slots.get(key)
            if found is None or found.shape != value.shape:
                what = "missing" if found is None else f"of shape {tuple(found.shape)}"
                raise ValueError(
                    f"the optimizer's {key} is {what}; expected shape {tuple(value.shape)}: "
                    "convert the model again, or leave its optimizer out (--fresh-optimizer)"
                )
            if isinstance(value, DTensor):
                value.copy_(distribute_tensor(found, value.device_mesh, value.placements))
            else:
                value.copy_(found)
