"""The original's Adafactor, against its rule in numpy float64, one variable at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from gpt2ml_torch import GPT2ML, GPT2MLConfig
from gpt2ml_torch.finetuning.adafactor import Adafactor, parameter_groups

Array = NDArray[np.float64]
STEPS = 20


class Variable:
    """One of the original's variables: (in, out) kernels, vectors, and their slots."""

    def __init__(self, value: Array, *, decays: bool) -> None:
        self.value = value
        self.decay = 0.01 if decays else 0.0
        self.slots = [np.zeros(size) for size in value.shape]  # vr, vc of a matrix; v of a vector

    def step(self, gradient: Array, rate: float, *, clipping_rms: float = 1.0) -> None:
        squares = gradient**2 + 1e-30
        if gradient.ndim == 2:
            self.slots[0] = 0.999 * self.slots[0] + 0.001 * squares.mean(1)
            self.slots[1] = 0.999 * self.slots[1] + 0.001 * squares.mean(0)
            rows = 1 / np.sqrt(self.slots[0] / self.slots[0].mean() + 1e-30)
            columns = 1 / np.sqrt(self.slots[1] + 1e-30)
            update = gradient * rows[:, None] * columns[None, :]
        else:
            self.slots[0] = 0.999 * self.slots[0] + 0.001 * squares
            update = gradient / np.sqrt(self.slots[0] + 1e-30)
        update = update / max(1.0, float(np.sqrt(np.mean(update**2))) / clipping_rms)
        self.value = self.value - rate * (update + self.decay * self.value)


class Reference:
    """The variables that a PyTorch parameter stands for: transposed kernels; q, k and v apart."""

    def __init__(self, name: str, parameter: torch.Tensor) -> None:
        self.parts = 3 if "qkv" in name else 1
        self.transposed = parameter.ndim == 2 and "embedding" not in name
        decays = "norm" not in name and "bias" not in name
        self.variables = [
            Variable(value, decays=decays) for value in self.split(parameter.detach())
        ]

    def split(self, tensor: torch.Tensor) -> list[Array]:
        parts = np.split(tensor.double().numpy(), self.parts)
        return [part.T.copy() if self.transposed else part.copy() for part in parts]

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        for variable, part in zip(self.variables, self.split(gradient), strict=True):
            variable.step(part, rate)

    def check(self, parameter: torch.Tensor, state: dict[str, torch.Tensor], atol: float) -> None:
        for variable, value in zip(self.variables, self.split(parameter.detach()), strict=True):
            np.testing.assert_allclose(value, variable.value, rtol=0, atol=atol)
        slots = ("vc", "vr") if self.transposed else ("vr", "vc")
        for index, slot in enumerate(slots if parameter.ndim == 2 else ("v",)):
            expected = np.stack([variable.slots[index] for variable in self.variables])
            found = state[slot].double().numpy().reshape(expected.shape)
            np.testing.assert_allclose(found, expected, rtol=1e3 * atol, atol=1e-40)


def small_model(dtype: torch.dtype) -> GPT2ML:
    torch.manual_seed(0)
    config = GPT2MLConfig(
        vocab_size=13,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=7,
    )
    return GPT2ML(config).to(dtype)


def gradients(parameter: torch.Tensor, step: int) -> torch.Tensor:
    """Of very different sizes from row to row and from step to step, some small enough not to be
    clipped.
    """
    noise = torch.randn_like(parameter)
    scale = torch.logspace(-4, 2, parameter.shape[0], dtype=parameter.dtype)
    return noise * scale.view(-1, *[1] * (parameter.ndim - 1)) * (0.01 if step % 5 else 1.0)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 3e-7)])
def test_every_step_is_the_originals_for_each_of_its_variables(
    dtype: torch.dtype, atol: float
) -> None:
    model = small_model(dtype)
    optimizer = Adafactor(parameter_groups(model))
    references = {name: Reference(name, p) for name, p in model.named_parameters()}
    for step in range(STEPS):
        rate = 1e-2 * (1 - step / STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in model.named_parameters():
            parameter.grad = gradients(parameter, step)
            references[name].step(parameter.grad, rate)
        optimizer.step()
        for name, parameter in model.named_parameters():
            references[name].check(parameter, optimizer.state[parameter], atol)


def test_query_key_and_value_are_clipped_apart() -> None:
    model = small_model(torch.float64)
    weight = model.get_parameter("blocks.0.attention.qkv.weight")
    before = weight.detach().clone()
    weight.grad = torch.cat([torch.full((8, 8), size) for size in (1e-3, 1.0, 1e3)]).double()
    Adafactor(parameter_groups(model, weight_decay=0.0), lr=1.0).step()
    torch.testing.assert_close(before - weight.detach(), torch.ones_like(weight))


def test_norms_and_biases_do_not_decay() -> None:
    model = small_model(torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Adafactor(parameter_groups(model), lr=0.5).step()
    for name, parameter in model.named_parameters():
        shrinks = not ("norm" in name or "bias" in name)
        expected = before[name] * (1 - 0.5 * 0.01 if shrinks else 1)
        torch.testing.assert_close(parameter.detach(), expected)


def test_a_resumed_run_takes_the_same_steps() -> None:
    straight, resumed = small_model(torch.float32), small_model(torch.float32)
    optimizers = [Adafactor(parameter_groups(model), lr=1e-2) for model in (straight, resumed)]
    for step in range(6):
        if step == 3:
            state = optimizers[1].state_dict()
            optimizers[1] = Adafactor(parameter_groups(resumed), lr=1e-2)
            optimizers[1].load_state_dict(state)
        torch.manual_seed(step)
        for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
            one.grad = gradients(one, step)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_any_module_can_be_trained() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(24, 1))
    x, y = torch.randn(16, 3, 8), torch.randn(16, 1)
    optimizer = Adafactor(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    "settings",
    [{"lr": -1.0}, {"beta2": 1.0}, {"weight_decay": -0.1}, {"clipping_rms": 0.0}, {"stacked": 3}],
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Adafactor([nn.Parameter(torch.ones(4, 2))], **settings)  # type: ignore[arg-type]
