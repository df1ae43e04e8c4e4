"""The operators of the namespace `gpt2ml`: schemas, shapes, and fallbacks without kernels.

The C++ kernels register themselves for the CPU when `load_kernels` finds or builds them. Elsewhere
PyTorch's own operators do the same, without rounding a packed layer's inputs.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2ml_torch.kernels import build, packing
from gpt2ml_torch.precision import PANEL, Precision

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_HEAD_SIZES = (16, 32, 64, 128)

_ROWS_AT_ONCE = 1024  # a multiple of a panel's; what PyTorch packs takes memory for each

_logger = logging.getLogger(__name__)

_library = torch.library.Library("gpt2ml", "DEF")
_library.define(
    "packed_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int bits, int outputs) "
    "-> Tensor"
)
_library.define(
    "packed_layers(Tensor h, Tensor positions, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor[] weights, Tensor[] scales, Tensor[] biases, Tensor[] norms, int bits, "
    "Tensor[] changes, Tensor? adapter_of_row) -> Tensor"
)
_library.define("pack(Tensor rows, Tensor(a!) weight, Tensor(b!)? scale, int bits) -> ()")


def packed_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    outputs: int,
) -> Tensor:
    """x Wᵀ + b for a weight from `pack`: (..., K) -> (..., N) in the dtype of x.

    On the CPU the inputs of integer weights are rounded too, to int8 with a scale for each row and
    group, and on CPUs that multiply bfloat16 inputs of bfloat16 weights are too; sums are exact or
    in float32. A row's result does not depend on the other rows. Gradients flow to x only.
    """
    return torch.ops.gpt2ml.packed_linear(x, weight, scale, bias, bits, outputs)


def packed_layers(
    h: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    bits: int,
    changes: Sequence[Tensor] = (),
    adapter_of_row: Tensor | None = None,
) -> Tensor:
    """All layers over their key-value cache: (B, T, D) -> (B, T, D).

    keys, values: (layers, B, S, H, K), written to at the slots `positions`, (B, T) int64; each
    token then attends to all slots up to its own. Layer by layer, `weights`, `scales` (none for
    floating-point weights) and `biases` are of qkv, attention output, mlp.up and mlp.down; `norms`
    are weight and bias of mlp_norm and output_norm. `changes` are the matrices of LoRA adapters
    (see `PackedAdapter`), and `adapter_of_row`, (B,) int64, has the number of each row's adapter,
    -1 for none. A token's result does not depend on the other rows and tokens of the
    call, bit for bit. There is a kernel for the CPU alone, and nothing to fall back to: see
    `supports_layers`.
    """
    layers = weights, scales, biases, norms, bits
    adapters = changes, adapter_of_row if changes else None
    return torch.ops.gpt2ml.packed_layers(h, positions, keys, values, *layers, *adapters)


def supports_layers(like: Tensor, head_size: int) -> bool:
    """Whether `packed_layers` takes inputs like this one, where `load_kernels` succeeded."""
    return (
        like.device.type == "cpu" and like.dtype in KERNEL_DTYPES and head_size in KERNEL_HEAD_SIZES
    )


def pack(weight: Tensor, precision: Precision | str) -> tuple[Tensor, Tensor | None]:
    """Round and pack a weight, (N, K) floating; returns the packed weight and its scale.

    Raises `ValueError` for what the precision can't hold: NaN and infinity in integers, numbers
    beyond 65504 in float16.
    """
    precision = Precision.of(precision)
    packed, scale = packing.empty_packed(weight.shape[0], weight.shape[1], precision)
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        pack_rows(weight[first : first + _ROWS_AT_ONCE], packed, scale, precision, first=first)
    return packed, scale


@torch.no_grad()
def pack_rows(
    rows: Tensor, packed: Tensor, scale: Tensor | None, precision: Precision, *, first: int
) -> None:
    """Pack rows of a weight from row `first` on, a multiple of 16, as `pack` does all of them."""
    bits = precision.bits
    panels = slice(first // PANEL, -(-(first + len(rows)) // PANEL))
    packed, scale = packed[panels], None if scale is None else scale[panels]
    if rows.dtype in KERNEL_DTYPES and rows.device.type == "cpu" and load_kernels():
        torch.ops.gpt2ml.pack(rows.contiguous(), packed, scale, bits)
    else:
        packing.pack_rows(rows, packed, scale, bits)
    if scale is not None and not scale.isfinite().all():
        raise ValueError(
            f"a weight with NaN or infinity can't be stored as {precision}; take a sound file"
        )
    if packed.dtype == torch.float16 and packed.abs().max().isinf() and rows.isfinite().all():
        raise ValueError("a weight is beyond the largest of float16, 65504")


@functools.cache
def load_kernels() -> bool:
    """Make the operators fast on this CPU; where that can't be, says why, once, returns False."""
    try:
        _load_library()
    except (OSError, RuntimeError) as error:
        _logger.warning("packed weights run on PyTorch's own operators, slower: %s", error)
        _library.impl("packed_linear", unpacked_linear, "CPU")
        return False
    # OpenMP's threads don't exist in a forked child, which would wait for them forever.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    return True


def _load_library() -> None:
    """Raises `OSError` or `RuntimeError` where the library can't be made or loaded."""
    library = build.build()
    try:
        torch.ops.load_library(library)
    except OSError:  # made for another system that shares the folder
        torch.ops.load_library(build.build(again=True))


def unpacked_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, bits: int, outputs: int
) -> Tensor:
    """`packed_linear` in PyTorch's own operators, which the compiler can fuse."""
    plain = packing.unpack(weight, scale, bits, outputs, x.shape[-1])  # (N, K), float32
    if torch.compiler.is_compiling() and x.numel() == x.shape[-1]:
        # A single row: one loop over the packed weight, which is unpacked on the way.
        y = (plain * x.flatten().float()).sum(-1).to(x.dtype).view(*x.shape[:-1], outputs)
        return y if bias is None else y + bias.to(x.dtype)
    return F.linear(x, plain.to(x.dtype), None if bias is None else bias.to(x.dtype))


@torch.library.register_fake("gpt2ml::packed_linear")
def _packed_linear_shape(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, bits: int, outputs: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.register_fake("gpt2ml::packed_layers")
def _packed_layers_shape(h: Tensor, *others: object) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's own protocol
    x, weight, scale, bias, bits, outputs = inputs
    if bias is not None and bias.requires_grad:
        raise ValueError("a packed layer's bias can't be trained; freeze it")
    ctx.save_for_backward(weight, scale)
    ctx.bits, ctx.outputs, ctx.inputs = bits, outputs, x.shape[-1]


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    weight, scale = ctx.saved_tensors
    plain = packing.unpack(weight, scale, ctx.bits, ctx.outputs, ctx.inputs)
    return gradient @ plain.to(gradient.dtype), *(None,) * 5


torch.library.register_autograd("gpt2ml::packed_linear", _backward, setup_context=_save)
