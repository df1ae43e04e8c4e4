"""Updates inside the backward pass: each gradient is used and freed as soon as it is complete."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gpt2ml_torch.finetuning.optimizers.sliced import SlicedOptimizer, whole


class StepInBackward:
    """Updates each parameter as soon as its gradient is complete, and frees the gradient.

    A weight that is used twice (the tied embedding) is updated once, after both uses. The first
    gradient that is not finite sets `broken` and ends the updates. `gradient_norm` covers all
    parameters. Call `reset` before each backward pass.
    """

    def __init__(self, optimizer: SlicedOptimizer) -> None:
        self.optimizer = optimizer
        self.broken = False
        self._square = 0.0
        self._handles: list[RemovableHandle] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    hook = self._hook_for(group)
                    self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def _hook_for(self, group: dict[str, Any]) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            norm = gradient_norm([parameter.grad])
            self._square += norm**2
            self.broken = self.broken or not math.isfinite(norm)
            if not self.broken:
                self.optimizer.step_parameter(parameter, group)
            parameter.grad = None

        return hook

    @property
    def gradient_norm(self) -> float:
        """The 2-norm of all gradients since the last `reset`."""
        return math.sqrt(self._square)

    def reset(self) -> None:
        """Begin a new step."""
        self._square = 0.0
        self.broken = False

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def gradient_norm(gradients: Iterable[Tensor]) -> float:
    """The 2-norm of these gradients together, sharded or not."""
    squares = 0.0
    for gradient in gradients:
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        squares += float(whole(torch.linalg.vector_norm(gradient, dtype=dtype))) ** 2
    return math.sqrt(squares)
