"""All layers of a model as one operator, where every one of them runs on the kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from gpt2ml_torch.kernels.low_rank import RowAdapters
from gpt2ml_torch.kernels.modules import PackedLinear
from gpt2ml_torch.kernels.ops import packed_layers, supports_layers

_EPSILON = 1e-5  # of every LayerNorm, a constant in the kernel
_MODULE = "gpt2ml_torch.model"  # whose blocks are what the kernel computes


def can_run_layers(blocks: Iterable[Any], *, like: Tensor, head_size: int) -> bool:
    """Whether `run_layers` takes these blocks, with activations of the device and dtype of `like`.

    Every linear layer must be packed, since one with an adapter is no packed layer any more, and no
    module may have a hook, which the operator would not call.
    """
    return supports_layers(like, head_size) and all(
        runs_as_written(block, PackedLinear) for block in blocks
    )


def runs_as_written(block: Any, linear: type[nn.Linear]) -> bool:
    """Whether the kernel computes what the block does: its parts have exactly the expected types,
    with linear layers of the given type, and no method or hook was changed.

    This runs for every block at every step, so it reads the modules' dictionaries directly: an
    attribute of an `nn.Module` takes ten times as long.
    """
    parts = block._modules
    attention, mlp = parts["attention"], parts["mlp"]
    for part in (block, attention, mlp):
        if type(part).__module__ != _MODULE or not is_untouched(part):
            return False
    for norm in (parts["mlp_norm"], parts["output_norm"]):
        if type(norm) is not nn.LayerNorm or norm.eps != _EPSILON or not is_untouched(norm):
            return False
    inner = attention._modules, mlp._modules
    layers = (inner[0]["qkv"], inner[0]["output"], inner[1]["up"], inner[1]["down"])
    return all(
        type(layer) is linear
        and is_untouched(layer)
        and (linear is not PackedLinear or layer.has_kernel)
        for layer in layers
    )


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward: no hooks, no replaced method."""
    state = module.__dict__
    return not (state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)


def run_layers(
    blocks: Iterable[Any],
    h: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    adapters: RowAdapters | None = None,
) -> Tensor:
    """All blocks over their key-value cache, as `packed_layers` says: (B, T, D) -> (B, T, D)."""
    weights: list[Tensor] = []
    scales: list[Tensor] = []
    biases: list[Tensor] = []
    norms: list[Tensor] = []
    bits = 0
    # At every step for some hundred tensors: as in `runs_as_written`, not by attributes.
    for block in blocks:
        parts = block._modules
        attention, mlp = parts["attention"]._modules, parts["mlp"]._modules
        for layer in (attention["qkv"], attention["output"], mlp["up"], mlp["down"]):
            buffers = layer._buffers
            weights.append(buffers["weight"])
            if buffers["weight_scale"] is not None:
                scales.append(buffers["weight_scale"])
            biases.append(layer._parameters["bias"])
            bits = layer.bits
        for norm in (parts["mlp_norm"]._parameters, parts["output_norm"]._parameters):
            norms += norm["weight"], norm["bias"]
    return packed_layers(
        h,
        positions,
        keys,
        values,
        weights=weights,
        scales=scales,
        biases=biases,
        norms=norms,
        bits=bits,
        changes=[] if adapters is None else adapters.matrices,
        adapter_of_row=None if adapters is None else adapters.of_rows,
    )
