"""Parameter groups: weight decay, and parameters that join several variables of the original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

STACKED = {"qkv": 3}  # layers that join variables: query, key and value


def parameter_groups(
    module: nn.Module, *, weight_decay: float = 0.01, scale: Callable[[str], float] | None = None
) -> list[dict[str, Any]]:
    """Group a module's trainable parameters as the original does, and by `scale(name)`.

    Vectors (norms and biases) have no weight decay; a joined qkv counts as three variables. The
    training loop multiplies the learning rate by each group's `scale` (1 by default).
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
