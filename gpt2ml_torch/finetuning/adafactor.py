"""The Adafactor that GPT2_ML was trained with, which is another rule than `torch.optim.Adafactor`.

No momentum, a fixed beta2 without bias correction, an absolute learning rate: its state is a row
and a column of statistics per matrix, which is why it fits where Adam does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NO_DECAY = ("norm", "bias")  # the original's "LayerNorm" and "bias" in this project's names
STACKED = {"qkv": 3}  # query, key and value are three variables in the original


class Adafactor(Optimizer):
    """Adafactor without momentum; `params` as for any optimizer, best from `parameter_groups`.

    Each parameter's state is `v` (of its own shape) or, for matrices, `vr` (a mean square per row)
    and `vc` (one per column), in float32 or wider. A group with `stacked=n` holds parameters that
    are n separate variables joined along their first dimension: each part is scaled and clipped by
    itself, and `vr`, `vc` are (n, rows / n) and (n, columns). Note that the original stores its
    kernels transposed, so its `adafactor_vr` is this `vc`. Raises `ValueError` for settings outside
    their range. Source: imcaspar/gpt2-ml, train/optimization_adafactor.py, AdaFactorOptimizer.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-4,
        *,
        beta2: float = 0.999,
        weight_decay: float = 0.01,
        clipping_rms: float = 1.0,
        eps: float = 1e-30,
        stacked: int = 1,
    ) -> None:
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"lr is {lr} and weight_decay {weight_decay}; expected 0 or more")
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2 is {beta2}; expected 0 <= beta2 < 1")
        if clipping_rms <= 0 or eps <= 0:
            raise ValueError(f"clipping_rms is {clipping_rms} and eps {eps}; expected more than 0")
        defaults = {
            "lr": lr,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "clipping_rms": clipping_rms,
            "eps": eps,
            "stacked": stacked,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        stacked = self.param_groups[-1]["stacked"]
        for parameter in self.param_groups[-1]["params"]:
            if stacked > 1 and (parameter.ndim == 0 or parameter.shape[0] % stacked):
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is in a group with "
                    f"stacked={stacked}; expected a first dimension that {stacked} divides"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update_parameter(parameter, parameter.grad, self.state[parameter], group)
        return loss


def parameter_groups(module: nn.Module, *, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """A module's trainable parameters, grouped as the original treats them: by decay or none,
    joined or single.
    """
    groups: dict[tuple[float, int], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if any(part in name for part in NO_DECAY) else weight_decay
        layer = name.rpartition(".")[0].rpartition(".")[2]
        groups.setdefault((decay, STACKED.get(layer, 1)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "stacked": stacked}
        for (decay, stacked), parameters in groups.items()
    ]


@torch.no_grad()
def update_parameter(
    parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    """One step of one parameter, in place; `state` is filled on the first one."""
    if gradient.is_sparse:
        raise ValueError(
            "a gradient is sparse; expected dense ones: build the embedding with sparse=False"
        )
    parameter.copy_(updated(parameter, gradient, state, group))


def updated(
    parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> Tensor:
    """The parameter's next value, in float32 or wider, and the state moved on."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    parts = (group["stacked"], -1, *parameter.shape[1:])
    gradient = gradient.to(dtype).reshape(parts)
    if parameter.ndim == 2:
        update = _factored(gradient, state, group)
    else:
        update = _elementwise(gradient, state, group, shape=parameter.shape)
    within = tuple(range(1, update.ndim))
    rms = torch.linalg.vector_norm(update, dim=within, keepdim=True)
    rms /= (update.numel() / group["stacked"]) ** 0.5
    update /= (rms / group["clipping_rms"]).clamp_(min=1.0)
    update = update.view(parameter.shape)
    value = parameter.to(dtype)
    if group["weight_decay"]:
        update.add_(value, alpha=group["weight_decay"])
    return value - update.mul_(group["lr"])


def _factored(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """The gradient (parts, rows, columns), scaled by the outer product of row and column
    statistics.
    """
    if not state:
        state["vr"] = gradient.new_zeros(gradient.shape[:2])
        state["vc"] = gradient.new_zeros(gradient.shape[0], gradient.shape[2])
    vr, vc = state["vr"], state["vc"]
    for statistic, dim in ((vr, 2), (vc, 1)):
        # Norms rather than squares: nothing of the gradient's size is allocated for them.
        mean_square = torch.linalg.vector_norm(gradient, dim=dim).square_()
        mean_square.div_(gradient.shape[dim]).add_(group["eps"])
        statistic.view_as(mean_square).lerp_(mean_square, 1 - group["beta2"])
    row_factor = (vr / vr.mean(1, keepdim=True) + group["eps"]).rsqrt_()
    column_factor = (vc + group["eps"]).rsqrt_()
    return gradient * row_factor[:, :, None] * column_factor[:, None, :]


def _elementwise(
    gradient: Tensor, state: dict[str, Any], group: dict[str, Any], *, shape: torch.Size
) -> Tensor:
    """The gradient, scaled by a statistic of its own shape."""
    if not state:
        state["v"] = gradient.new_zeros(shape)
    v = state["v"].view(gradient.shape)
    v.lerp_(gradient.square().add_(group["eps"]), 1 - group["beta2"])
    return gradient * (v + group["eps"]).rsqrt_()
