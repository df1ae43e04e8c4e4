"""The base class of the optimizers, which update one parameter at a time in slices of rows.

Arithmetic is in float32 or wider, yet a weight of 130 MB needs temporaries of only a few megabytes,
never a float32 copy. bfloat16 weights are rounded stochastically, or to nearest.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gpt2ml_torch.finetuning.optimizers.rounding import round_stochastically_

SLICE = 1 << 18  # elements in flight: 1 MB in float32, which a cache holds


class SlicedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose subclasses define the step of a single parameter.

    `stochastic_rounding` applies to bfloat16 weights only. It draws from a generator that belongs
    to the optimizer and is seeded with `seed`; `rounding_state` gets and sets its state, which is
    part of `state_dict`. Raises `ValueError` for a negative `lr` or `weight_decay`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        stochastic_rounding: bool,
        seed: int,
    ) -> None:
        for name in ("lr", "weight_decay"):
            if not defaults[name] >= 0:
                raise ValueError(f"{name} is {defaults[name]}; expected a number from 0")
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
        """Create all slots now, before the first step, so that a checkpoint can be loaded."""
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
        """Step one parameter of one of `param_groups` with its gradient.

        Raises `ValueError` for a sparse gradient.
        """
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            raise ValueError(
                "a gradient is sparse; expected a dense one: build the embedding with sparse=False"
            )
        self._update(parameter, parameter.grad, group, self._state_of(parameter, group))

    def _write(self, weights: Tensor, values: Tensor) -> None:
        """Store new values, float32 or wider, in a slice of the weights."""
        if weights.dtype == torch.bfloat16 and self.stochastic_rounding:
            round_stochastically_(weights, values, generator=self._generator)
        elif values is not weights:
            weights.copy_(values)

    @property
    def rounding_state(self) -> Tensor:
        """The state of the generator for stochastic rounding."""
        return self._generator.get_state()

    @rounding_state.setter
    def rounding_state(self, state: Tensor) -> None:
        self._generator.set_state(state.cpu())

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, with the state of stochastic rounding."""
        return super().state_dict() | {"rounding_state": self.rounding_state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "rounding_state"})
        self.rounding_state = state_dict["rounding_state"]
        # PyTorch casts slots to the weights' dtype, which rounds slots of bfloat16 weights.
        saved, own = (
            itertools.chain.from_iterable(group["params"] for group in groups)
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        for key, parameter in zip(saved, own, strict=True):
            for name, slot in state_dict["state"].get(key, {}).items():
                device = slot.device if slot.ndim == 0 else parameter.device
                self.state[parameter][name] = slot.detach().to(device, copy=True)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: the tensor itself, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from the other processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_at_once(tensor: Tensor, *, multiple_of: int = 1) -> int:
    """The number of rows in a slice: about `SLICE` elements, at least one row."""
    width = max(1, tensor[:1].numel())
    return max(multiple_of, SLICE // width // multiple_of * multiple_of)
