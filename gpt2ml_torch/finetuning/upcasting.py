"""bfloat16 weights multiplied in float32, one block at a time.

On a CPU without bfloat16 instructions (before Intel's Sapphire Rapids and AMD's Zen 4), products
and attention take three to six times as long in bfloat16 as in float32. A temporary float32 copy of
one block's weights costs far less than that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2ml_torch.kernels.build import cpu_features
from gpt2ml_torch.model import GPT2ML, TokenEmbedding


def cpu_lacks_bfloat16() -> bool:
    """Whether this is an x86 CPU without instructions for bfloat16 products."""
    features = cpu_features()
    return bool(features) and features.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))


def upcast_products(model: GPT2ML) -> None:
    """Make the model compute in float32, in place; its weights keep their dtype.

    Gradients have the dtype of the weights. Decoding with a cache does not change. Names,
    parameters, adapters and hooks stay, since only methods of the modules are replaced.
    """
    for block in model.blocks:
        block.forward = functools.partial(_upcast_forward, block, block.forward)
    embedding = model.token_embedding
    logits = functools.partial(_upcast_logits, embedding)
    embedding.logits = logits


def _upcast_forward(
    block: nn.Module,
    forward: Callable[..., Tensor],
    h: Tensor,
    *arguments: Any,
    cache: Any = None,
    **options: Any,
) -> Tensor:
    """Call a block's `forward` with float32 copies of its weights, through `functional_call`."""
    if cache is not None or h.dtype == torch.float32:
        return forward(h, *arguments, cache=cache, **options)
    wide = {name: parameter.float() for name, parameter in block.named_parameters()}
    result: Tensor = torch.func.functional_call(block, wide, (h.float(), *arguments), options)
    return result.to(h.dtype)


def _upcast_logits(embedding: TokenEmbedding, h: Tensor) -> Tensor:
    return F.linear(h.float(), embedding.weight.float())
