"""The prefix cache: keys and values of prompts read before, so that what they share is read once.

A token's keys and values depend on the tokens before it alone, so the longest common beginning of
two windows may be copied instead of read. Of a window that is the same to its end, the logits are
known too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2ml_torch.kv_cache import KVCache


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two windows have in common at their beginning."""
    longest = min(len(first), len(second))
    if tuple(first[:longest]) == tuple(second[:longest]):
        return longest
    return next(place for place in range(longest) if first[place] != second[place])


class Prefix(NamedTuple):
    """A window that was read: copies of its keys and values, (layers, T, H, K), and the logits
    after it, (1, V).
    """

    keys: Tensor
    values: Tensor
    logits: Tensor


class PrefixCache:
    """At most `max_tokens` tokens of prompts, the least recently used forgotten first."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.tokens = 0
        self._entries: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()

    def match(self, ids: Sequence[int]) -> tuple[int, tuple[int, ...] | None]:
        """The longest beginning of `ids` that is held: its length and the entry's key."""
        best, found = 0, None
        for key in self._entries:
            length = common_length(key, ids)
            if length > best:
                best, found = length, key
        return best, found

    def logits(self, key: tuple[int, ...]) -> Tensor:
        """The logits after an entry, (1, V)."""
        return self._entries[key].logits

    @torch.inference_mode()
    def copy_to(self, key: tuple[int, ...], length: int, cache: KVCache, row: int) -> None:
        """Copy the beginning of an entry to a row."""
        entry = self._entries[key]
        self._entries.move_to_end(key)
        cache.keys[:, row, :length] = entry.keys[:, :length]
        cache.values[:, row, :length] = entry.values[:, :length]

    @torch.inference_mode()
    def add(self, ids: Sequence[int], cache: KVCache, row: int, logits: Tensor) -> None:
        """Keep the keys and values of a window that was read into a row, and the logits after it.

        A window that is the beginning of one that is held is not kept.
        """
        key = tuple(ids)
        length, held = self.match(key)
        if not 0 < len(key) <= self.max_tokens or length == len(key):
            return
        if held is not None and length == len(held):  # a beginning of this one
            self._forget(held)
        while self.tokens + len(key) > self.max_tokens:
            self._forget(next(iter(self._entries)))
        keys, values = cache.keys[:, row, : len(key)], cache.values[:, row, : len(key)]
        self._entries[key] = Prefix(keys.clone(), values.clone(), logits.clone())
        self.tokens += len(key)

    def clear(self) -> None:
        self._entries.clear()
        self.tokens = 0

    def _forget(self, key: tuple[int, ...]) -> None:
        del self._entries[key]
        self.tokens -= len(key)
