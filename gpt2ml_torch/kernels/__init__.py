"""Weights of 32 to 4 bits for decoding at the speed of memory, with kernels built on demand."""

from gpt2ml_torch.kernels.modules import PackedEmbedding, PackedLinear, fill_rows, pack_model
from gpt2ml_torch.kernels.ops import (
    has_block_kernel,
    load_kernels,
    pack,
    packed_block,
    packed_linear,
)
from gpt2ml_torch.kernels.packing import unpack

__all__ = [
    "PackedEmbedding",
    "PackedLinear",
    "fill_rows",
    "has_block_kernel",
    "load_kernels",
    "pack",
    "pack_model",
    "packed_block",
    "packed_linear",
    "unpack",
]
