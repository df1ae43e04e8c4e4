"""Parameter groups: which weights decay, and which are several variables of the original in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

STACKED = {"qkv": 3}  # layers that join variables: query, key and value


def parameter_groups(
    module: nn.Module, *, weight_decay: float = 0.01, scale: Callable[[str], float] | None = None
) -> list[dict[str, Any]]:
    """A module's trainable parameters, grouped as the original treats them, and by `scale(name)`.

    Vectors (norms and biases) do not decay; query, key and value are three variables. Each group
    carries its `scale` (1 by default), with which the training loop multiplies the learning rate.
    Source: imcaspar/gpt2-ml, train/optimization_adafactor.py.
    """
    groups: dict[tuple[float, int, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim == 1 else weight_decay
        layer = name.split(".")[-2] if "." in name else ""
        key = decay, STACKED.get(layer, 1), scale(name) if scale else 1.0
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "stacked": stacked, "scale": factor}
        for (decay, stacked, factor), members in groups.items()
    ]
