"""bfloat16 weights multiplied in float32, one block at a time.

A CPU without bfloat16 instructions (before Intel's Sapphire Rapids and AMD's Zen 4) takes three to
six times as long for bfloat16 products and attention as for those of float32. There a float32 copy
of one block's weights, which lives as long as the block is computed, costs little beside the gain.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2ml_torch.kernels.build import cpu_features
from gpt2ml_torch.model import GPT2ML, Block, TokenEmbedding


def cpu_lacks_bfloat16() -> bool:
    """Whether this is an x86 CPU without instructions for bfloat16 products."""
    features = cpu_features()
    return bool(features) and features.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))


def upcast_products(model: GPT2ML) -> None:
    """Let the model compute in float32 whatever its weights are, which stay as they are; in place.

    Gradients arrive in the weights' own dtype. Decoding with a cache is as it was.
    """
    for block in model.blocks:
        _change_class(block, _UpcastBlock)
    _change_class(model.token_embedding, _UpcastEmbedding)


def _change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """As `fully_shard` does it: names and parameters stay, and so do adapters and hooks."""
    module.__class__ = kind


class _UpcastBlock(Block):
    def forward(self, h: Tensor, *, cache: Any = None, **options: Any) -> Tensor:
        if cache is not None or h.dtype == torch.float32:
            return super().forward(h, cache=cache, **options)
        wide = {name: parameter.float() for name, parameter in self.named_parameters()}
        result: Tensor = torch.func.functional_call(self, wide, (h.float(),), options)
        return result.to(h.dtype)


class _UpcastEmbedding(TokenEmbedding):
    def logits(self, h: Tensor) -> Tensor:
        return F.linear(h.float(), self.weight.float())
