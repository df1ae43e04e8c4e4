"""AdamW with float32 states, or with torchao's 8-bit states."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gpt2ml_torch.finetuning.optimizers.sliced import SlicedOptimizer, local, rows_at_once
from gpt2ml_torch.finetuning.optional import require

_BLOCK = 256  # elements that share a scale in torchao's 8-bit states
_SMALLEST = 4096  # smaller tensors keep float32 states


class AdamW(SlicedOptimizer):
    """The rule of `torch.optim.AdamW`, applied in slices.

    With `eight_bit` (which needs the extra `finetune`), tensors of at least 4,096 elements keep
    their states in 8 bits, in blocks of 256 with a dynamic map: 2 bytes a weight instead of 8.
    Raises `ValueError` for settings out of range, and for `eight_bit` with sharded parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        eight_bit: bool = False,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas) or eps <= 0:
            raise ValueError(f"betas are {betas} and eps {eps}; expected 0 <= beta < 1, eps > 0")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, stochastic_rounding=stochastic_rounding, seed=seed)
        self.eight_bit = eight_bit
        sharded = any(isinstance(p, DTensor) for g in self.param_groups for p in g["params"])
        if eight_bit and sharded:
            raise ValueError("8-bit AdamW and several processes exclude each other; use adafactor")

    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        like = parameter.detach()  # a slot must not be a Parameter
        if self.eight_bit and like.numel() >= _SMALLEST and like.numel() % _BLOCK == 0:
            mean, square = _eight_bit_zeros(like, signed=True), _eight_bit_zeros(like, signed=False)
        else:
            dtype = torch.promote_types(like.dtype, torch.float32)
            mean, square = (torch.zeros_like(like, dtype=dtype) for _ in range(2))
        step = torch.zeros((), dtype=torch.int64)
        return {"step": step, "exp_avg": mean, "exp_avg_sq": square}

    def _update(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Tensor]
    ) -> None:
        state["step"] += 1
        step = int(state["step"])
        beta1, beta2 = group["betas"]
        step_size = group["lr"] / (1 - beta1**step)
        scale = math.sqrt(1 - beta2**step)
        tensors = [local(t) for t in (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])]
        for weights, g, mean, square in _slices(*tensors):
            values = weights.to(mean.dtype)  # the weights themselves, if they are as wide
            g = g.to(mean.dtype)
            new_mean = _float(mean).lerp_(g, 1 - beta1)  # in place, unless it is 8-bit
            new_square = _float(square).mul_(beta2).addcmul_(g, g, value=1 - beta2)
            if type(mean) is not Tensor:
                mean.copy_(new_mean)
                square.copy_(new_square)
            denominator = new_square.sqrt().div_(scale).add_(group["eps"])
            values.mul_(1 - group["lr"] * group["weight_decay"])
            self._write(weights, values.addcdiv_(new_mean, denominator, value=-step_size))


def _eight_bit_zeros(like: Tensor, *, signed: bool) -> Tensor:
    states = require("torchao.optim.subclass_8bit", "8-bit AdamW").OptimState8bit
    return cast(Tensor, states.zeros(like.shape, signed, _BLOCK, like.device))


def _float(slot: Tensor) -> Tensor:
    return slot if type(slot) is Tensor else cast(Any, slot).dequantize(torch.float32)


def _slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same rows of several tensors of one shape."""
    first = tensors[0]
    if first.ndim == 0:
        yield tensors
        return
    # 8-bit states can be cut between their blocks only.
    step = rows_at_once(first, multiple_of=_BLOCK // math.gcd(_BLOCK, max(1, first[:1].numel())))
    for start in range(0, len(first), step):
        yield tuple(tensor[start : start + step] for tensor in tensors)
