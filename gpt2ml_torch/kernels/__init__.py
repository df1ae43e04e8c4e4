"""Weights of 16, 8 and 4 bits for decoding at the speed of memory, with kernels built on demand."""

from gpt2ml_torch.kernels.modules import PackedEmbedding, PackedLinear, fill_packed, pack_model
from gpt2ml_torch.kernels.ops import cached_attention, load_kernels, packed_linear
from gpt2ml_torch.kernels.packing import pack, unpack

__all__ = [
    "PackedEmbedding",
    "PackedLinear",
    "cached_attention",
    "fill_packed",
    "load_kernels",
    "pack",
    "pack_model",
    "packed_linear",
    "unpack",
]
