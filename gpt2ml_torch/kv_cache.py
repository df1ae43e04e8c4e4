"""The key-value cache of incremental decoding.

Shapes:
    B  batch rows       S  slots       H  heads       K  head size
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.kernels.low_rank import NO_ADAPTER, RowAdapters


class KVCache:
    """The keys and values of the tokens seen so far, in tensors that never move or grow.

    Slot s of a row holds the token at position s, so rows of different lengths need no padding on
    the left: a query at position p reads slots 0..p, and what lies beyond is stale and never seen.
    Rows may be reordered, copied or dropped with plain indexing of `keys` and `values`, both
    (layers, B, S, H, K). A new cache is empty; raises `ValueError` for a `length` that the model
    has no positions for.

    `adapters`, for a model on the kernels, tells which LoRA adapter each row is read and written
    with: keys and values of one adapter mean nothing to another, so it goes wherever they go.
    """

    __slots__ = ("adapters", "keys", "values")

    keys: Tensor
    values: Tensor
    adapters: RowAdapters | None

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
        self.adapters = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, adapters: RowAdapters | None = None) -> KVCache:
        """A cache on tensors at hand, which it shares; both (layers, B, S, H, K)."""
        cache = cls.__new__(cls)
        cache.keys, cache.values, cache.adapters = keys, values, adapters
        return cache

    @property
    def parts(self) -> tuple[Tensor, Tensor, RowAdapters | None]:
        """What `of` takes: keys, values and adapters."""
        return self.keys, self.values, self.adapters

    @property
    def batch_size(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The keys and values of one layer, for blocks that run one by one; views (B, S, H, K).

        Raises `ValueError` for a cache with adapters, which such blocks would leave out.
        """
        if self.adapters is not None:
            raise ValueError("adapters are added by the kernels of packed weights; merge them here")
        return self.keys[index], self.values[index]

    def rows(self, start: int, end: int) -> KVCache:
        """The rows from `start` to before `end`, as a view."""
        adapters = None if self.adapters is None else self.adapters.rows(start, end)
        return self.of(self.keys[:, start:end], self.values[:, start:end], adapters)

    @torch.inference_mode()
    def use_adapter(self, row: int, number: int) -> None:
        """Read and write a row with this one of `adapters` from now on, or `NO_ADAPTER`.

        Raises `ValueError` for a number that `adapters` does not have.
        """
        count = 0 if self.adapters is None else len(self.adapters.adapters)
        if not NO_ADAPTER <= number < count:
            raise ValueError(f"the cache has no adapter {number}; it has {count}")
        if self.adapters is not None:
            self.adapters.of_rows[row] = number

    @torch.inference_mode()
    def copy_row(self, row: int, target: KVCache, to: int, length: int) -> None:
        """Copy the first `length` slots of a row to a row of a cache, this one or another."""
        target.keys[:, to, :length] = self.keys[:, row, :length]
        target.values[:, to, :length] = self.values[:, row, :length]
        if self.adapters is not None and target.adapters is not None:
            target.adapters.of_rows[to] = self.adapters.of_rows[row]
