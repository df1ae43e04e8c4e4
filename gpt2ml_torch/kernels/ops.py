"""The operators `gpt2ml::packed_linear` and `gpt2ml::cached_attention`: schemas, shapes, fallbacks.

The C++ kernels register themselves for the CPU when `load_kernels` finds or builds them. Elsewhere
PyTorch's own operators do the same: slower, and without rounding a packed layer's inputs.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2ml_torch.kernels import build, packing

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_HEAD_SIZES = (16, 32, 64, 128)

_logger = logging.getLogger(__name__)

_library = torch.library.Library("gpt2ml", "DEF")
_library.define(
    "packed_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int bits, int outputs, "
    "bool gelu) -> Tensor"
)
_library.define(
    "cached_attention(Tensor q, Tensor keys, Tensor values, Tensor positions) -> Tensor"
)


def packed_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    outputs: int,
    gelu: bool = False,
) -> Tensor:
    """x Wᵀ + b, or its GELU, for a weight from `pack`: (..., K) -> (..., N) in the dtype of x.

    On the CPU the inputs are rounded too, to bfloat16 for 16-bit weights, else to int8 with a scale
    for each row and group; sums are exact or in float32. A row's result does not depend on the
    other rows. Gradients flow to x only, and not through the GELU.
    """
    return torch.ops.gpt2ml.packed_linear(x, weight, scale, bias, bits, outputs, gelu)


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attend to all slots of the cache up to each token's own position: (B, T, H, K) -> the same.

    keys, values: (B, S, H, K), the tokens' own included; positions: (B, T) int64. On the CPU a
    token's result does not depend on the other rows and tokens of the call, bit for bit.
    """
    supported = q.dtype in KERNEL_DTYPES and q.shape[-1] in KERNEL_HEAD_SIZES
    if supported and q.device.type == "cpu" and load_kernels():
        return torch.ops.gpt2ml.cached_attention(q, keys, values, positions)
    return _plain_attention(q, keys, values, positions)


@torch.compiler.assume_constant_result
def load_kernels() -> bool:
    """Make the operators fast on this CPU; where that can't be, says why, once, returns False."""
    return _load_kernels()


@functools.cache
def _load_kernels() -> bool:
    _library.impl("packed_linear", _unpacked_linear, "CUDA")
    _library.impl("cached_attention", _plain_attention, "CUDA")
    try:
        torch.ops.load_library(build.build())
    except (OSError, RuntimeError) as error:
        _logger.warning("packed weights run on PyTorch's own operators, slower: %s", error)
        _library.impl("packed_linear", _unpacked_linear, "CPU")
        _library.impl("cached_attention", _plain_attention, "CPU")
        return False
    return True


def _unpacked_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    outputs: int,
    gelu: bool,
) -> Tensor:
    plain = packing.unpack(weight, scale, bits, outputs, x.shape[-1]).to(x.dtype)
    y = F.linear(x, plain, None if bias is None else bias.to(x.dtype))
    return F.gelu(y) if gelu else y


def _plain_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    slots = torch.arange(keys.shape[1], device=q.device)  # (S,)
    mask = (slots <= positions[:, :, None])[:, None]  # (B, 1, T, S)
    q, k, v = (t.transpose(1, 2) for t in (q, keys, values))  # (B, H, T or S, K)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@torch.library.register_fake("gpt2ml::packed_linear")
def _packed_linear_shape(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    outputs: int,
    gelu: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.register_fake("gpt2ml::cached_attention")
def _cached_attention_shape(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's own protocol
    x, weight, scale, bias, bits, outputs, gelu = inputs
    if gelu or (bias is not None and bias.requires_grad):
        raise ValueError("a packed layer's bias and its built-in GELU can't be trained through")
    ctx.save_for_backward(weight, scale)
    ctx.bits, ctx.outputs, ctx.inputs = bits, outputs, x.shape[-1]


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    weight, scale = ctx.saved_tensors
    plain = packing.unpack(weight, scale, ctx.bits, ctx.outputs, ctx.inputs)
    return gradient @ plain.to(gradient.dtype), *(None,) * 6


torch.library.register_autograd("gpt2ml::packed_linear", _backward, setup_context=_save)
