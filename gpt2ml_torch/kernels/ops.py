"""The operator `gpt2ml::packed_linear`: schema, shapes, gradient, and what runs without a compiler.

The C++ kernel registers itself for the CPU when `load_kernels` finds or builds it. Elsewhere the
same weights are unpacked and multiplied by PyTorch: slower, and the inputs are not rounded.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2ml_torch.kernels import build, packing

_logger = logging.getLogger(__name__)

_library = torch.library.Library("gpt2ml", "DEF")
_library.define(
    "packed_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int bits, int outputs)"
    " -> Tensor"
)


def _unpacked_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, bits: int, outputs: int
) -> Tensor:
    plain = packing.unpack(weight, scale, bits, outputs, x.shape[-1]).to(x.dtype)
    return F.linear(x, plain, None if bias is None else bias.to(x.dtype))


@torch.library.register_fake("gpt2ml::packed_linear")
def _shape(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, bits: int, outputs: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's own protocol
    x, weight, scale, bias, bits, outputs = inputs
    if bias is not None and bias.requires_grad:
        raise ValueError("the bias of a packed layer can't be trained; freeze it")
    ctx.save_for_backward(weight, scale)
    ctx.bits, ctx.outputs, ctx.inputs = bits, outputs, x.shape[-1]


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    weight, scale = ctx.saved_tensors
    plain = packing.unpack(weight, scale, ctx.bits, ctx.outputs, ctx.inputs)
    return gradient @ plain.to(gradient.dtype), None, None, None, None, None


torch.library.register_autograd("gpt2ml::packed_linear", _backward, setup_context=_save)


@functools.cache
def load_kernels() -> bool:
    """Make the operator fast on this CPU; says why, once, and returns False where that can't be."""
    _library.impl("packed_linear", _unpacked_linear, "CUDA")
    try:
        torch.ops.load_library(build.build())
    except (OSError, RuntimeError) as error:
        _logger.warning("packed weights run on PyTorch's own operators, slower: %s", error)
        _library.impl("packed_linear", _unpacked_linear, "CPU")
        return False
    return True


def packed_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, *, bits: int, outputs: int
) -> Tensor:
    """x Wᵀ + b for a weight from `packing.pack`: (..., K) -> (..., N) in the dtype of x.

    On the CPU the inputs are rounded too, to bfloat16 for 16-bit weights, else to int8 with a scale
    for each row and group; sums are exact or in float32. A row's result does not depend on the
    other rows. Gradients flow to x only.
    """
    return torch.ops.gpt2ml.packed_linear(x, weight, scale, bias, bits, outputs)
