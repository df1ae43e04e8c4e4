"""Stochastic rounding to bfloat16, with which small updates of a weight are not lost.

bfloat16 keeps 8 bits of a weight, so near 0.1 its neighbours are 4e-4 apart, and an update of 1e-5
rounded to nearest changes nothing, ever. Rounded up with a probability equal to the fraction that
is cut off, its expectation is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_BITS = 16  # what float32 has below bfloat16


@torch.no_grad()
def round_stochastically_(
    target: Tensor, source: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Write float32 `source`, rounded stochastically, to bfloat16 `target` of the same shape.

    A value between two neighbours becomes the upper one (in magnitude) with the probability of its
    distance from the lower one; a representable value, an infinity or NaN stays what it is.
    Elements are rounded independently, and the same generator state gives the same result. Raises
    `ValueError` for other dtypes or shapes.
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
    if not source.sum().isfinite():  # one pass, where there is nothing to be mended
        rounded = torch.where(source.isfinite(), rounded, source)
    return target.copy_(rounded)


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Whole numbers from -32,768 to 32,767, uniform and independent, int16 of `like`'s shape."""
    count = like.numel()
    # One draw of 64 bits serves four elements: drawing is the slowest part on the CPU.
    draws = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
    draws.random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[:count].view(like.shape)
