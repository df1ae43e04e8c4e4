"""All layers of a model as one operator, where every one of them runs on the kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gpt2ml_torch.kernels.modules import PackedLinear
from gpt2ml_torch.kernels.ops import packed_layers, supports_layers


def can_run_layers(blocks: Iterable[Any], *, like: Tensor, head_size: int) -> bool:
    """Whether `run_layers` takes these blocks, with activations of the device and dtype of `like`.

    All linear layers must be packed: one with an adapter is no packed layer any more.
    """
    return supports_layers(like, head_size) and all(
        isinstance(layer, PackedLinear) and layer.has_kernel for layer in _linears(blocks)
    )


def run_layers(
    blocks: Iterable[Any], h: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """All blocks over their key-value cache, as `packed_layers` says: (B, T, D) -> (B, T, D)."""
    blocks = list(blocks)
    layers = _linears(blocks)
    norms = [norm for block in blocks for norm in (block.mlp_norm, block.output_norm)]
    return packed_layers(
        h,
        positions,
        keys,
        values,
        weights=[layer.weight for layer in layers],
        scales=[layer.weight_scale for layer in layers if layer.weight_scale is not None],
        biases=[layer.bias for layer in layers],
        norms=[parameter for norm in norms for parameter in (norm.weight, norm.bias)],
        bits=layers[0].bits,
    )


def _linears(blocks: Iterable[Any]) -> list[Any]:
    """The layers with the large matrices, in the order in which they are used."""
    return [
        layer
        for block in blocks
        for layer in (block.attention.qkv, block.attention.output, block.mlp.up, block.mlp.down)
    ]
