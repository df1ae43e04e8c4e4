"""Start Adafactor from the statistics of the original training, kept in the model file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt2ml_torch.finetuning.optimizers.adafactor import Adafactor
from gpt2ml_torch.options import OptionError


@torch.no_grad()
def start_from(optimizer: Adafactor, module: nn.Module, slots: Mapping[str, Tensor]) -> None:
    """Set the optimizer's statistics from `slots`, by names like `blocks.0.mlp.up.weight.vr`.

    `module` names the parameters; statistics of frozen ones are ignored. Raises `ValueError` if one
    is missing or has the wrong shape.
    """
    optimizer.allocate()
    for name, parameter in module.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            key = f"{name}.{slot}"
            found = slots.get(key)
            if found is None or found.shape != value.shape:
                what = "missing" if found is None else f"of shape {tuple(found.shape)}"
                raise OptionError(
                    "the optimizer's {} is {}; expected shape {}: convert the model again, or "
                    "leave its optimizer out ({fresh_optimizer=True})",
                    key,
                    what,
                    tuple(value.shape),
                )
            if isinstance(value, DTensor):
                value.copy_(distribute_tensor(found, value.device_mesh, value.placements))
            else:
                value.copy_(found)
