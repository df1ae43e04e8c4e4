"""Optimizers that step one parameter at a time, so that a gradient can be used and freed inside the
backward pass.

All arithmetic is float32, in slices of rows: next to a weight of 130 MB stand temporaries of a few
megabytes, never
a float32 copy of it. Weights may be float32 or bfloat16, the latter rounded stochastically or to
nearest.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from gpt2ml_torch.finetuning.rounding import round_stochastically_

SLICE = 1 << 20  # elements in flight: 4 MB in float32
_QUANTISATION_BLOCK = 256  # elements that share a scale in torchao's 8-bit states


class SlicedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose subclasses define `_update`, the step of one parameter.

    `stochastic_rounding` concerns bfloat16 weights alone. Its random numbers come from a generator
    of the
    optimizer's own, seeded with `seed`; `rounding_state` reads and sets it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        if defaults["lr"] < 0:
            raise ValueError(f"lr is {defaults['lr']}; expected a number from 0")
        super().__init__(params, defaults)
        self.stochastic_rounding = stochastic_rounding
        device = self.param_groups[0]["params"][0].device
        if device.type == "meta":
            device = torch.device("cpu")
        self._generator = torch.Generator(device).manual_seed(seed)

    @abstractmethod
    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The slots of one parameter before its first step."""

    @abstractmethod
    def _update(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Tensor]
    ) -> None:
        """Step one parameter and its slots in place."""

    def allocate(self) -> None:
        """Make every slot now instead of at its first step, as loading a checkpoint needs."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state_of(parameter, group)

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state.update(self._new_state(parameter, group))
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_parameter(parameter, group)
        return loss

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Step one parameter of one of `param_groups` with its gradient."""
        assert parameter.grad is not None
        self._update(parameter, parameter.grad, group, self._state_of(parameter, group))

    def _write(self, weights: Tensor, values: Tensor) -> None:
        """Store new float32 values in a slice of the weights."""
        if weights.dtype == torch.bfloat16 and self.stochastic_rounding:
            round_stochastically_(weights, values, generator=self._generator)
        else:
            weights.copy_(values)

    @property
    def rounding_state(self) -> Tensor:
        """State of the generator behind the stochastic rounding."""
        return self._generator.get_state()

    @rounding_state.setter
    def rounding_state(self, state: Tensor) -> None:
        self._generator.set_state(state.cpu())


class Adafactor(SlicedOptimizer):
    """The Adafactor that GPT2_ML was trained with: no momentum, fixed beta2, each update clipped at
    an RMS of 1.

    A matrix has a mean square for each row, `vr`, and for each column, `vc`; any other parameter
    one for each element, `v`. A
    group with `stacked=n` holds parameters that are n variables joined along their first dimension
    (query, key and value):
    each is scaled and clipped by itself, so `vc` is (n, columns). The original stores kernels
    transposed: its
    `adafactor_vr` is this `vc`. Source: imcaspar/gpt2-ml, train/optimization_adafactor.py,
    AdaFactorOptimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-4,
        beta2: float = 0.999,
        weight_decay: float = 0.01,
        clipping_rms: float = 1.0,
        eps: float = 1e-30,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "clipping_rms": clipping_rms,
            "eps": eps,
            "stacked": 1,
        }
        super().__init__(params, defaults, stochastic_rounding=stochastic_rounding, seed=seed)

    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        like = parameter.detach()
        dtype = torch.promote_types(like.dtype, torch.float32)
        if like.ndim != 2:
            return {"v": torch.zeros_like(like, dtype=dtype)}
        # Made from a column of the parameter, so that it is sharded as the rows are.
        vr = torch.zeros_like(like[:, 0], dtype=dtype)
        vc = torch.zeros(group["stacked"], like.shape[1], dtype=dtype, device=like.device)
        return {"vr": vr, "vc": vc}

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
            values = weights[rows].to(cut.dtype)  # a view of the weights, if they are as wide
            values.mul_(1 - group["lr"] * group["weight_decay"])
            self._write(weights[rows], values.sub_(scaled(part, rows), alpha=rates[part]))


Scaled = Callable[[int, slice], Tensor]


def _factored(
    cut: RowCut, gradient: Tensor, group: dict[str, Any], state: dict[str, Tensor]
) -> Scaled:
    """Move the statistics of rows and columns on; the function gives the gradient of some rows,
    scaled by them.
    """
    g, vr, vc = local(gradient), local(state["vr"]), state["vc"]
    rows_in_part = gradient.shape[0] / group["stacked"]
    columns = torch.zeros_like(vc)  # sums of squares
    keep = 1 - group["beta2"]
    for part, rows in cut:
        squares = g[rows].to(cut.dtype).square()
        columns[part] += squares.sum(0)
        vr[rows].lerp_(squares.mean(1).add_(group["eps"]), keep)
    vc.lerp_(cut.total(columns).div_(rows_in_part).add_(group["eps"]), keep)
    row_sums = torch.zeros(group["stacked"], device=g.device, dtype=cut.dtype)
    for part, rows in cut:
        row_sums[part] += vr[rows].sum()
    means = cut.total(row_sums).div_(rows_in_part)
    column_factors = (vc + group["eps"]).rsqrt_()

    def scaled(part: int, rows: slice) -> Tensor:
        row_factors = (vr[rows] / means[part] + group["eps"]).rsqrt_()
        return g[rows].to(cut.dtype) * row_factors[:, None] * column_factors[part]

    return scaled


def _elementwise(
    cut: RowCut, gradient: Tensor, group: dict[str, Any], state: dict[str, Tensor]
) -> Scaled:
    """Move the statistic of each element on; the function gives the gradient of some rows, scaled
    by it.
    """
    g, v = local(gradient), local(state["v"])
    for _, rows in cut:
        square = g[rows].to(cut.dtype).square().add_(group["eps"])
        v[rows].lerp_(square, 1 - group["beta2"])

    def scaled(part: int, rows: slice) -> Tensor:
        return g[rows].to(cut.dtype) * (v[rows] + group["eps"]).rsqrt_()

    return scaled


class RowCut:
    """The rows that this process has of a parameter, cut into slices of one joined variable each.

    Iterating gives (which variable, slice of local rows), about `SLICE` elements at a time.
    """

    def __init__(self, parameter: Tensor, stacked: int) -> None:
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)
        self._mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        count = len(local(parameter))
        first = 0
        if self._mesh is not None:
            # Shard(0) deals rows out like `torch.chunk`.
            first = min(
                len(parameter),
                self._mesh.get_local_rank() * -(-len(parameter) // self._mesh.size()),
            )
        size = len(parameter) // stacked
        step = max(1, SLICE // max(1, parameter[0].numel())) if count else 1
        self._slices = []
        for part in range(stacked):
            low, high = max(part * size - first, 0), min((part + 1) * size - first, count)
            for start in range(low, high, step):
                self._slices.append((part, slice(start, min(start + step, high))))

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        return iter(self._slices)

    def total(self, sums: Tensor) -> Tensor:
        """Sums over all processes of what each has summed over its rows."""
        if self._mesh is not None:
            dist.all_reduce(sums, group=self._mesh.get_group())
        return sums


class AdamW(SlicedOptimizer):
    """AdamW with float32 states, or with torchao's 8-bit ones (`eight_bit`, the extra `finetune`).

    The rule is that of `torch.optim.AdamW`. 8-bit states: blocks of 256 with a dynamic map, for
    tensors from 4,096
    elements; 2 bytes a weight instead of 8. Raises `ValueError` for sharded parameters with
    `eight_bit`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        eight_bit: bool = False,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, stochastic_rounding=stochastic_rounding, seed=seed)
        self.eight_bit = eight_bit
        sharded = any(isinstance(p, DTensor) for g in self.param_groups for p in g["params"])
        if eight_bit and sharded:
            raise ValueError("8-bit AdamW and several processes exclude each other; use adafactor")

    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        step = torch.zeros((), dtype=torch.int64)
        # Not of the class of `parameter`: a slot needs no gradient.
        like = parameter.detach()
        if self.eight_bit and like.numel() >= 4096 and like.numel() % _QUANTISATION_BLOCK == 0:
            from torchao.optim.subclass_8bit import OptimState8bit

            slots = [
                OptimState8bit.zeros(like.shape, signed, 256, like.device) for signed in (1, 0)
            ]
        else:
            slots = [torch.zeros_like(like, dtype=torch.float32) for _ in range(2)]
        return {"step": step, "exp_avg": slots[0], "exp_avg_sq": slots[1]}

    def _update(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Tensor]
    ) -> None:
        state["step"] += 1
        step = int(state["step"])
        beta1, beta2 = group["betas"]
        step_size = group["lr"] / (1 - beta1**step)
        scale = math.sqrt(1 - beta2**step)
        tensors = [local(t) for t in (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])]
        for weights, g, mean, square in slices(*tensors):
            g = g.float()
            new_mean = _dequantised(mean).lerp_(g, 1 - beta1)
            new_square = _dequantised(square).mul_(beta2).addcmul_(g, g, value=1 - beta2)
            if mean.dtype != torch.float32 or type(mean) is not Tensor:
                mean.copy_(new_mean)
                square.copy_(new_square)
            denominator = new_square.sqrt().div_(scale).add_(group["eps"])
            values = weights.float()  # float32 weights themselves, else a copy
            values.mul_(1 - group["lr"] * group["weight_decay"])
            self._write(weights, values.addcdiv_(new_mean, denominator, value=-step_size))


def _dequantised(slot: Tensor) -> Tensor:

    return slot if type(slot) is Tensor else cast(Any, slot).dequantize(torch.float32)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: the tensor itself, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of corresponding rows of tensors of one shape, each of about `SLICE` elements."""
    first = tensors[0]
    if first.numel() <= SLICE or first.ndim == 0:
        if first.numel():
            yield tensors
        return
    width = first[0].numel()
    # 8-bit states can be cut between their blocks only.
    step = _QUANTISATION_BLOCK // math.gcd(_QUANTISATION_BLOCK, width)
    rows = max(step, SLICE // width // step * step)
    for start in range(0, len(first), rows):
        yield tuple(tensor[start : start + rows] for tensor in tensors)


class StepInBackward:
    """Steps each parameter as soon as its gradient is complete, and frees the gradient.

    A weight that is used twice (the tied embedding) is stepped once, after both uses.
    `gradient_norm` is the norm over
    all parameters since it was last reset. A gradient that is not finite steps nothing and sets
    `broken`.
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
            if math.isfinite(norm):
                self.optimizer.step_parameter(parameter, group)
            else:
                self.broken = True
            parameter.grad = None

        return hook

    @property
    def gradient_norm(self) -> float:
        return math.sqrt(self._square)

    def reset(self) -> None:
        """Start a new step: forget the norm and whether a gradient was broken."""
        self._square = 0.0
        self.broken = False

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def gradient_norm(gradients: Iterable[Tensor]) -> float:
    """The 2-norm over all of these gradients, sharded or not."""
    squares = 0.0
    for gradient in gradients:
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        squares += float(norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
    return math.sqrt(squares)


def parameter_groups(
    model: nn.Module, *, weight_decay: float = 0.01, scale: Callable[[str], float] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters, grouped as the original treats them, and by `scale(name)`.

    Vectors (norms and biases) are not decayed; query, key and value are three variables. Each group
    carries `scale`, which
    the loop multiplies its learning rate with. Source: imcaspar/gpt2-ml,
    train/optimization_adafactor.py.
    """
    groups: dict[tuple[float, int, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim == 1 else weight_decay
            stacked = 3 if ".qkv.weight" in name or ".qkv.bias" in name else 1
            key = (decay, stacked, scale(name) if scale else 1.0)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "stacked": stacked, "scale": factor}
        for (decay, stacked, factor), members in groups.items()
    ]
