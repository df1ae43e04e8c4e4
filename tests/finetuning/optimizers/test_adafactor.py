"""The original's Adafactor, against its rule in TensorFlow ops, one variable at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpt2ml_torch import GPT2ML
from gpt2ml_torch.finetuning import Adafactor, parameter_groups
from gpt2ml_torch.finetuning.optimizers import sliced
from tests.helpers.parity import make_model, state_dict_of, tf_weights_of
from tests.helpers.weights import Sizes, loud_weights

SIZES = Sizes(layers=2, width=10, heads=2, mlp=12, vocab=13, positions=7)
STEPS = 20


def small_model(dtype: torch.dtype) -> GPT2ML:
    return make_model(SIZES, loud_weights(SIZES)).to(dtype)


def gradient_of(parameter: Tensor, step: int) -> Tensor:
    """Very different from row to row and from step to step; some so small as not to be clipped."""
    scale = torch.logspace(-4, 2, parameter.shape[0], dtype=parameter.dtype)
    scale = scale.view(-1, *[1] * (parameter.ndim - 1))
    return torch.randn_like(parameter) * scale * (0.01 if step % 5 else 1.0)


def slots_as_in_tf(model: GPT2ML, optimizer: Adafactor) -> dict[str, Tensor]:
    """Our statistics under the original's names and in its layout.

    Spread over their matrices, which `tf_weights_of` splits and transposes as it does weights.
    """
    rows, columns, vectors = {}, {}, {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if "v" in state:
            vectors[name] = state["v"]
        else:
            rows[name] = state["vr"][:, None].expand(parameter.shape)
            columns[name] = state["vc"].repeat_interleave(len(parameter) // len(state["vc"]), 0)
    found = {f"{name}/adafactor_v": v for name, v in tf_weights_of(vectors).items()}
    by_row, by_column = tf_weights_of(rows), tf_weights_of(columns)
    for name in by_row:
        pair = by_row[name], by_column[name]
        theirs = pair[::-1] if name.endswith("kernel") else pair  # kernels are transposed
        found[f"{name}/adafactor_vr"] = theirs[0][:, 0]
        found[f"{name}/adafactor_vc"] = theirs[1][0]
    return found


@pytest.mark.parametrize("slice_size", [1 << 20, 24])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_every_step_and_statistic_is_the_originals(
    dtype: torch.dtype, atol: float, slice_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece and in slices of two rows; float32 within a few roundings of weights up to 4."""
    TFAdafactor = pytest.importorskip("tests.helpers.tf_adafactor").TFAdafactor
    monkeypatch.setattr(sliced, "SLICE", slice_size)
    model = small_model(dtype)
    optimizer = Adafactor(parameter_groups(model))
    weights = tf_weights_of({name: p.detach() for name, p in model.named_parameters()})
    reference = TFAdafactor({name: w.numpy() for name, w in weights.items()})
    torch.manual_seed(0)
    for step in range(STEPS):
        rate = 1e-2 * (1 - step / STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter in model.parameters():
            parameter.grad = gradient_of(parameter, step)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        reference.step({n: g.numpy() for n, g in tf_weights_of(gradients).items()}, rate)
        optimizer.step()
    expected = state_dict_of(reference.weights)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=atol)
    found = slots_as_in_tf(model, optimizer)
    assert found.keys() == reference.slots.keys()
    for name, slot in reference.slots.items():
        np.testing.assert_allclose(
            found[name].numpy(), slot, rtol=1e3 * atol, atol=1e-40, err_msg=name
        )


def test_query_key_and_value_are_clipped_apart() -> None:
    model = small_model(torch.float64)
    weight = model.get_parameter("blocks.0.attention.qkv.weight")
    before = weight.detach().clone()
    width = SIZES.width
    parts = [torch.full((width, width), size) for size in (1e-3, 1.0, 1e3)]
    weight.grad = torch.cat(parts).double()
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    """In bfloat16 too, where slots stay float32 and the rounding's random numbers go on."""
    straight, resumed = small_model(dtype), small_model(dtype)
    optimizers = [Adafactor(parameter_groups(model), lr=1e-2) for model in (straight, resumed)]
    for step in range(6):
        if step == 3:
            state = optimizers[1].state_dict()
            optimizers[1] = Adafactor(parameter_groups(resumed), lr=1e-2, seed=5)
            optimizers[1].load_state_dict(state)
        torch.manual_seed(step)
        for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
            one.grad = gradient_of(one, step)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
        for slot, value in optimizers[0].state[one].items():
            assert value.dtype == torch.float32
            assert torch.equal(value, optimizers[1].state[other][slot])


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


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        Adafactor(embedding.parameters()).step()
