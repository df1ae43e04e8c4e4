"""The Adafactor with which GPT2_ML was trained; its rule differs from `torch.optim.Adafactor`.

It has no momentum, a fixed beta2 without bias correction, and an absolute learning rate. Its state
is one row and one column of statistics for each matrix, so it fits where Adam's state does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor import zeros as sharded_zeros

from gpt2ml_torch.finetuning.optimizers.sliced import (
    SlicedOptimizer,
    local,
    rows_at_once,
    whole,
)

Scaled = Callable[[int, slice], Tensor]  # (variable, its rows) -> their scaled gradient


class Adafactor(SlicedOptimizer):
    """Adafactor without momentum; `params` as for any optimizer, best from `parameter_groups`.

    A matrix has a mean square for each row (`vr`) and each column (`vc`); any other parameter has
    one for each element (`v`). All are float32 or wider. A group with `stacked=n` holds parameters
    that join n variables along the first dimension (query, key and value): each variable is scaled
    and clipped on its own, and `vc` is (n, columns). The original stores kernels transposed, so its
    `adafactor_vr` is `vc` here; the update is the same, since both have the same mean. Sharded
    parameters (`fully_shard`) have sharded statistics.

    Raises `ValueError` for settings outside their range, and for a parameter whose first dimension
    `stacked` does not divide. Source: imcaspar/gpt2-ml, train/optimization_adafactor.py,
    AdaFactorOptimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        *,
        beta2: float = 0.999,
        weight_decay: float = 0.01,
        clipping_rms: float = 1.0,
        eps: float = 1e-30,
        stacked: int = 1,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
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
        super().__init__(params, defaults, stochastic_rounding=stochastic_rounding, seed=seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        stacked = self.param_groups[-1]["stacked"]
        for parameter in self.param_groups[-1]["params"]:
            if stacked > 1 and (parameter.ndim == 0 or parameter.shape[0] % stacked):
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is in a group with "
                    f"stacked={stacked}; expected a first dimension that {stacked} divides"
                )

    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        like = parameter.detach()
        dtype = torch.promote_types(like.dtype, torch.float32)
        if like.ndim != 2:
            return {"v": torch.zeros_like(like, dtype=dtype)}
        # Made from a column of the parameter, so that it is sharded as the rows are.
        vr = torch.zeros_like(like[:, 0], dtype=dtype)
        return {"vr": vr, "vc": _zeros_by_column(group["stacked"], like, dtype)}

    def _update(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Tensor]
    ) -> None:
        cut = RowCut(parameter, group["stacked"])
        scaled = (_factored if "vr" in state else _elementwise)(cut, gradient, group, state)
        squares = torch.zeros(group["stacked"], device=parameter.device, dtype=cut.dtype)
        for part, rows in cut:
            squares[part] += scaled(part, rows).square().sum()
        rms = (cut.total(squares) / (parameter.numel() / group["stacked"])).sqrt_()
        rates = (group["lr"] / (rms / group["clipping_rms"]).clamp_(min=1.0)).tolist()
        weights = local(parameter)
        for part, rows in cut:
            target = weights[rows]
            values = target.to(cut.dtype)  # the weights themselves, if they are as wide
            values.mul_(1 - group["lr"] * group["weight_decay"])
            self._write(target, values.sub_(scaled(part, rows), alpha=rates[part]))


def _zeros_by_column(stacked: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros (stacked, columns of `like`), the columns sharded over the same processes."""
    size = stacked, like.shape[1]
    if not isinstance(like, DTensor):
        return torch.zeros(size, dtype=dtype, device=like.device)
    return sharded_zeros(size, dtype=dtype, device_mesh=like.device_mesh, placements=[Shard(1)])


def _factored(
    cut: RowCut, gradient: Tensor, group: dict[str, Any], state: dict[str, Tensor]
) -> Scaled:
    """Update the row and column statistics; return the function that scales a gradient."""
    g, vr, vc = local(gradient), local(state["vr"]), state["vc"]
    rows_in_part = gradient.shape[0] / group["stacked"]
    columns = torch.zeros(vc.shape, dtype=vc.dtype, device=g.device)  # sums of squares
    keep = 1 - group["beta2"]
    for part, rows in cut:
        squares = g[rows].to(cut.dtype).square()
        columns[part] += squares.sum(0)
        vr[rows].lerp_(squares.mean(1).add_(group["eps"]), keep)
    mean_squares = cut.total_by_column(columns).div_(rows_in_part).add_(group["eps"])
    local(vc).lerp_(mean_squares, keep)
    row_sums = torch.zeros(group["stacked"], dtype=vr.dtype, device=g.device)
    for part, rows in cut:
        row_sums[part] += vr[rows].sum()
    means = cut.total(row_sums).div_(rows_in_part)
    column_factors = (whole(vc) + group["eps"]).rsqrt_()

    def scaled(part: int, rows: slice) -> Tensor:
        row_factors = (vr[rows] / means[part] + group["eps"]).rsqrt_()
        return g[rows].to(cut.dtype) * row_factors[:, None] * column_factors[part]

    return scaled


def _elementwise(
    cut: RowCut, gradient: Tensor, group: dict[str, Any], state: dict[str, Tensor]
) -> Scaled:
    """Update the statistic of each element; return the function that scales a gradient."""
    g, v = local(gradient), local(state["v"])
    for _, rows in cut:
        square = g[rows].to(cut.dtype).square().add_(group["eps"])
        v[rows].lerp_(square, 1 - group["beta2"])

    def scaled(part: int, rows: slice) -> Tensor:
        return g[rows].to(cut.dtype) * (v[rows] + group["eps"]).rsqrt_()

    return scaled


class RowCut:
    """This process's rows of a parameter, in slices that each lie within one joined variable.

    Iterating yields (number of the variable, slice of local rows).
    """

    def __init__(self, parameter: Tensor, stacked: int) -> None:
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)
        self._mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        count, first = len(local(parameter)), 0
        if self._mesh is not None:
            # Shard(0) splits rows as `torch.chunk` does.
            each = -(-len(parameter) // self._mesh.size())
            first = min(len(parameter), self._mesh.get_local_rank() * each)
        size, step = len(parameter) // stacked, rows_at_once(parameter)
        self._slices = []
        for part in range(stacked):
            low, high = max(part * size - first, 0), min((part + 1) * size - first, count)
            for start in range(low, high, step):
                self._slices.append((part, slice(start, min(start + step, high))))

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        return iter(self._slices)

    def total(self, sums: Tensor) -> Tensor:
        """Sum over all processes of the sums over their rows."""
        if self._mesh is None:
            return sums
        return DTensor.from_local(sums, self._mesh, [Partial()]).full_tensor()

    def total_by_column(self, sums: Tensor) -> Tensor:
        """The same for (stacked, columns); return this process's columns."""
        if self._mesh is None:
            return sums
        return (
            DTensor.from_local(sums, self._mesh, [Partial()])
            .redistribute(placements=[Shard(1)])
            .to_local()
        )
