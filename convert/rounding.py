"""Rounding to nearest, once, whatever the numbers come from."""

from __future__ import annotations

import numpy as np

from convert.sources import Array

_LARGEST = {
    "float32": float(np.finfo(np.float32).max),
    "float16": float(np.finfo(np.float16).max),
    "bfloat16": float.fromhex("0x1.FEp127"),
}
_INFINITY = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}  # bits


def round_to(dtype: str, exact: Array) -> Array:
    """The nearest numbers of a type; those of bfloat16, which NumPy lacks, as their bits.

    Raises `ValueError` where a finite number becomes infinite.
    """
    if exact.dtype == dtype:
        return exact
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = _bfloat16(exact) if dtype == "bfloat16" else exact.astype(dtype)
    bits = rounded.view(f"u{rounded.itemsize}")
    infinite = bits & ((1 << (8 * rounded.itemsize - 1)) - 1) == _INFINITY[dtype]
    if infinite.any() and np.isfinite(exact[infinite]).any():
        largest = np.abs(exact[np.isfinite(exact)]).max()
        raise ValueError(
            f"values like {largest:.6g}, beyond the largest of {dtype}, {_LARGEST[dtype]:.6g}"
        )
    return rounded


def _bfloat16(exact: Array) -> Array:
    """The upper half of float32's bits, rounded to nearest, ties to even."""
    if exact.dtype == np.float64:
        single = _to_odd_float32(exact)
    else:
        single = exact.astype(np.float32, copy=False)
    bits = single.view(np.uint32)
    nearest = bits >> 16
    nearest &= 1
    nearest += 0x7FFF
    nearest += bits
    nearest >>= 16
    rounded = nearest.astype(np.uint16)
    nan = np.isnan(single)
    if nan.any():  # rounding could carry their bits into infinity's
        rounded[nan] = bits[nan] >> 16 | 0x40
    return rounded


def _to_odd_float32(exact: Array) -> Array:
    """Round float64 to float32 so that rounding again, to 16 bits, gives what one rounding would.

    Inexact results get an odd last bit, which no later tie can mistake (Boldo and Melquiond, 2008,
    "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd").
    """
    nearest = exact.astype(np.float32)
    bits = nearest.view(np.uint32)
    away = np.abs(nearest.astype(np.float64)) > np.abs(exact)
    inexact = nearest != exact
    odd = (bits - away) | inexact
    return np.where(np.isfinite(exact), odd, bits).astype(np.uint32).view(np.float32)
