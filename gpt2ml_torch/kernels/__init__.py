"""Weights of 32 to 4 bits for decoding at the speed of memory, with kernels built on demand."""

from gpt2ml_torch.kernels.layers import can_run_layers, run_layers
from gpt2ml_torch.kernels.low_rank import (
    LINEAR_LAYERS,
    NO_ADAPTER,
    Adapters,
    LowRank,
    PackedAdapter,
    RowAdapters,
)
from gpt2ml_torch.kernels.modules import PackedEmbedding, PackedLinear
from gpt2ml_torch.kernels.ops import (
    load_kernels,
    pack,
    packed_layers,
    packed_linear,
    supports_layers,
)
from gpt2ml_torch.kernels.packed_model import (
    PlainState,
    fill_rows,
    pack_for_decoding,
    pack_model,
    unpack_model,
)
from gpt2ml_torch.kernels.packing import unpack

__all__ = [
    "LINEAR_LAYERS",
    "NO_ADAPTER",
    "Adapters",
    "LowRank",
    "PackedAdapter",
    "PackedEmbedding",
    "PackedLinear",
    "PlainState",
    "RowAdapters",
    "can_run_layers",
    "fill_rows",
    "load_kernels",
    "pack",
    "pack_for_decoding",
    "pack_model",
    "packed_layers",
    "packed_linear",
    "run_layers",
    "supports_layers",
    "unpack",
    "unpack_model",
]
