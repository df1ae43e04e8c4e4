"""The converter's rounding, at and beside every middle of two neighbouring numbers; and its
transposes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from convert.source import round_to, rows_in_order

SIXTEEN_BITS = {"float16": 0x7C00, "bfloat16": 0x7F80}  # infinity's bits


def values_of(bits: NDArray[np.uint16], dtype: str) -> NDArray[np.float64]:
    tensor = torch.from_numpy(bits.astype(np.uint16)).view(getattr(torch, dtype))
    return tensor.double().numpy()


def bits_of(rounded: NDArray[np.generic]) -> NDArray[np.uint16]:
    return rounded.view(np.uint16)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("sign", [1, -1])
def test_float64_goes_to_the_nearest_and_from_a_middle_to_the_even(dtype: str, sign: int) -> None:
    """For all pairs of neighbours, the smallest subnormals and the largest finite ones among them.

    A middle and what is next to it differ by less than float32 could tell: rounding twice fails.
    """
    lower = np.arange(SIXTEEN_BITS[dtype] - 1, dtype=np.uint16)
    upper = lower + 1
    middle = (values_of(lower, dtype) + values_of(upper, dtype)) / 2
    even = lower + (lower & 1)
    for exact, expected in (
        (middle, even),
        (np.nextafter(middle, 0), lower),
        (np.nextafter(middle, np.inf), upper),
    ):
        found = bits_of(round_to(dtype, sign * exact)) & 0x7FFF
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_float32_is_rounded_as_pytorch_does_it(dtype: str) -> None:
    """At the middles that float32 can hold, beside them, and anywhere."""
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    upper_half = np.arange(0, 2**16, dtype=np.uint32) << 16
    beside = [upper_half + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    exact = np.concatenate([random, *(bits.view(np.float32) for bits in beside)])
    limit = values_of(np.array([SIXTEEN_BITS[dtype] - 1], np.uint16), dtype)[0]
    exact = exact[(np.abs(exact) <= limit) & ~np.isnan(exact)]
    expected = torch.from_numpy(exact).to(getattr(torch, dtype)).view(torch.uint16).numpy()
    assert np.array_equal(bits_of(round_to(dtype, exact)), expected)


@pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, "float32"])
@pytest.mark.parametrize("source", ["float64", "float32"])
def test_no_number_stays_none_and_infinity_infinite(dtype: str, source: str) -> None:
    # The second NaN's bits would round up to the bits of -0.
    bits = np.array([0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000], np.uint32)
    with np.errstate(invalid="ignore"):
        rounded = round_to(dtype, bits.view(np.float32).astype(source))
        values = rounded.astype(np.float64) if dtype != "bfloat16" else values_of(rounded, dtype)
    assert np.isnan(values[:3]).all()
    assert values[3:].tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize(
    ("dtype", "fits", "overflows"),
    [
        ("float16", 65519.99, 65520.0),
        ("bfloat16", 3.3961e38, 3.3962e38),
        ("float32", 3.4028235677973364e38, 3.4028235677973366e38),
    ],
)
def test_what_would_become_infinite_is_an_error(dtype: str, fits: float, overflows: float) -> None:
    round_to(dtype, np.array([1.0, -fits]))
    with pytest.raises(ValueError, match=f"values like .* beyond the largest of {dtype}"):
        round_to(dtype, np.array([1.0, -overflows]))


@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (500, 3), (128, 128), (129, 257), (300, 300)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint16"])
def test_a_transposed_matrix_comes_in_order(shape: tuple[int, int], dtype: str) -> None:
    matrix = np.arange(shape[0] * shape[1]).reshape(shape).astype(dtype)
    at = 0
    for piece in rows_in_order(matrix.T):
        assert piece.flags.c_contiguous
        assert np.array_equal(piece, matrix.T[at : at + len(piece)])
        at += len(piece)
    assert at == len(matrix.T)


@pytest.mark.parametrize("shape", [(7,), (300_000,), (3000, 100), (2, 400_000)])
def test_what_is_in_order_comes_as_it_is(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    pieces = list(rows_in_order(array))
    assert all(np.shares_memory(piece, array) for piece in pieces)
    assert np.array_equal(np.concatenate(pieces), array)
