"""The key-value cache of incremental decoding.

Shapes:
    B  batch rows       S  slots       H  heads       K  head size
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2ml_torch.config import GPT2MLConfig


class KVCache:
    """The keys and values of the tokens seen so far, in tensors that never move or grow.

    Slot s of a row holds the token at position s, so rows of different lengths need no padding on
    the left: a query at position p reads slots 0..p, and what lies beyond is stale and never seen.
    Rows may be reordered, copied or dropped with plain indexing of `keys` and `values`, both
    (layers, B, S, H, K). A new cache is empty; raises `ValueError` for a `length` that the model
    has no positions for.
    """

    __slots__ = ("keys", "values")

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
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> KVCache:
        """A cache on tensors at hand, which it shares; both (layers, B, S, H, K)."""
        cache = cls.__new__(cls)
        cache.keys, cache.values = keys, values
        return cache

    @property
    def batch_size(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one layer, each a view (B, S, H, K)."""
        return self.keys[index], self.values[index]

    def rows(self, start: int, end: int) -> KVCache:
        """The rows from `start` to before `end`, as a view."""
        return self.of(self.keys[:, start:end], self.values[:, start:end])

    @torch.inference_mode()
    def copy_row(self, row: int, target: KVCache, to: int, length: int) -> None:
        """Copy the first `length` slots of a row to a row of a cache, this one or another."""
        target.keys[:, to, :length] = self.keys[:, row, :length]
        target.values[:, to, :length] = self.values[:, row, :length]
