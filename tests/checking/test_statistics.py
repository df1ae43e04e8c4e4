"""The sums behind the statistics of `gpt2ml check` are right, for awkward numbers too."""

from __future__ import annotations

import pytest
import torch

from gpt2ml_torch.checking.statistics import moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(700, 900), (900,)])
def test_moments_are_those_of_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    found = moments(tensor)
    assert found.non_finite == 0
    assert found.mean == pytest.approx(tensor.double().mean().item(), rel=1e-6)
    assert found.std == pytest.approx(tensor.double().std(correction=0).item(), rel=1e-5)


def test_numbers_that_are_not_finite_are_counted_and_left_out() -> None:
    found = moments(torch.tensor([[1.0, float("nan")], [3.0, float("-inf")]]))
    assert (found.mean, found.std, found.non_finite) == (2.0, 1.0, 2)


def test_finite_numbers_whose_squares_float32_cannot_hold_are_finite() -> None:
    found = moments(torch.tensor([1e30, -1e30]))
    assert found.non_finite == 0
    assert found.std == pytest.approx(1e30)
