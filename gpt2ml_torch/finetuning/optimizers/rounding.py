"""Stochastic rounding to bfloat16, which preserves small updates on average.

bfloat16 has 8 significant bits: near 0.1 neighbouring numbers are 4e-4 apart, and an update of 1e-5
rounded to nearest is always lost. If the value is rounded up with a probability equal to the
fraction that is cut off, its expectation is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_BITS = 16  # bits of float32 that bfloat16 lacks


@torch.no_grad()
def round_stochastically_(
    target: Tensor, source: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Write float32 `source`, rounded stochastically, to bfloat16 `target` of the same shape.

    A value between two neighbours becomes the larger one (in magnitude) with a probability equal
    to its relative distance from the smaller one. Representable values, infinities and NaN are
    unchanged. Elements are rounded independently; equal generator states give equal results.
    Raises `ValueError` for other dtypes or shapes.
    """
    if target.dtype != torch.bfloat16 or source.dtype != torch.float32:
        raise ValueError(
            f"stochastic rounding goes from float32 to bfloat16; found {source.dtype} and "
            f"{target.dtype}"
        )
    if target.shape != source.shape:
        raise ValueError(f"shapes {tuple(source.shape)} and {tuple(target.shape)} differ")
    bits = source.contiguous().view(torch.int32) + _noise(source, generator)
    bits.add_(1 << (_LOW_BITS - 1)).bitwise_and_(-(1 << _LOW_BITS))
    rounded = bits.view(torch.float32)
    if not source.sum().isfinite():  # a single pass in the usual case
        rounded = torch.where(source.isfinite(), rounded, source)
    return target.copy_(rounded)


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Whole numbers from -32,768 to 32,767, uniform and independent, int16 of `like`'s shape."""
    count = like.numel()
    # One draw of 64 bits serves four elements: drawing is the slowest part on the CPU.
    draws = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[:count].view(like.shape)
