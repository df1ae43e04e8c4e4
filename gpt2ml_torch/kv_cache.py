"""The key-value cache of incremental decoding.

Shapes:
    B  batch rows       S  slots       H  heads       K  head size
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpt2ml_torch.config import GPT2MLConfig


class CacheTensors(NamedTuple):
    """The tensors of a cache, or a view of some of its rows: what steps and graphs take."""

    keys: Tensor  # (layers, B, S, H, K)
    values: Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[2]


class KVCache(nn.Module):
    """The keys and values of the tokens seen so far, in buffers that never move or grow.

    Slot s of a row holds the token at position s, so rows of different lengths need no padding on
    the left: a query at position p reads slots 0..p, and what lies beyond is stale and never seen.
    Rows may be reordered, copied or dropped with plain indexing of `keys` and `values`, both
    (layers, B, S, H, K).
    """

    keys: Tensor
    values: Tensor

    def __init__(
        self,
        config: GPT2MLConfig,
        *,
        batch_size: int,
        length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= length <= config.max_position_embeddings:
            raise ValueError(
                f"a cache of {length} slots was asked for; this model has positions for 1 to "
                f"{config.max_position_embeddings}"
            )
        shape = (
            config.num_hidden_layers,
            batch_size,
            length,
            config.num_attention_heads,
            config.head_size,
        )
        # Zeros, not empty: a masked slot still multiplies its value by 0, and 0 * NaN is NaN.
        for name in ("keys", "values"):
            self.register_buffer(
                name, torch.zeros(shape, device=device, dtype=dtype), persistent=False
            )

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    @torch.inference_mode()
    def copy_row(self, row: int, target: KVCache, to: int, length: int) -> None:
        """Copy the first `length` slots of a row to a row of a cache, this one or another."""
        target.keys[:, to, :length] = self.keys[:, row, :length]
        target.values[:, to, :length] = self.values[:, row, :length]
