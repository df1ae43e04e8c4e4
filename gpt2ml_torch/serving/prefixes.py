"""The prefix cache: keys and values of prompts read before, so that what they share is read once.

A token's keys and values depend on the adapter and the tokens before it alone, so the longest
common beginning of two windows may be copied instead of read. Of a window that is the same to its
end, the logits are known too.
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


COPIED_AT_ONCE = 128  # tokens


class Window(NamedTuple):
    """Tokens, and the name of the adapter that they are read with."""

    ids: tuple[int, ...]
    adapter: str | None


class Prefix(NamedTuple):
    """A window that was read: copies of its keys and values, (layers, T, H, K), and the logits
    after it, (1, V).
    """

    keys: Tensor
    values: Tensor
    logits: Tensor


class PrefixCopy:
    """A window on its way into the cache. It is copied as it is read, part by part, so that texts
    beside never wait for the whole of it.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._copied = 0

    @torch.inference_mode()
    def follow(self, cache: KVCache, row: int, read: int) -> None:
        """Copy what a row holds of the window by now, `read` tokens."""
        if self.keys is None or self.values is None:
            layers, _, _, heads, size = cache.keys.shape
            self.keys = cache.keys.new_empty(layers, len(self.window.ids), heads, size)
            self.values = torch.empty_like(self.keys)
        part = slice(self._copied, read)
        self.keys[:, part] = cache.keys[:, row, part]
        self.values[:, part] = cache.values[:, row, part]
        self._copied = read


class PrefixCache:
    """At most `max_tokens` tokens of prompts, the least recently used forgotten first."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.tokens = 0
        self._entries: OrderedDict[Window, Prefix] = OrderedDict()

    def match(self, window: Window) -> tuple[int, Window | None]:
        """The longest beginning of a window that is held: its length and the entry's key."""
        best, found = 0, None
        for key in self._entries:
            length = common_length(key.ids, window.ids) if key.adapter == window.adapter else 0
            if length > best:
                best, found = length, key
        return best, found

    def logits(self, key: Window) -> Tensor:
        """The logits after an entry, (1, V)."""
        return self._entries[key].logits

    @torch.inference_mode()
    def copy_to(self, key: Window, length: int, cache: KVCache, row: int) -> None:
        """Copy the beginning of an entry to a row."""
        entry = self._entries[key]
        self._entries.move_to_end(key)
        cache.keys[:, row, :length] = entry.keys[:, :length]
        cache.values[:, row, :length] = entry.values[:, :length]

    def begin(self, window: Window, known: int) -> PrefixCopy | None:
        """Room for the keys and values of a window, the first `known` tokens of which are in a row
        already, or None where it is not kept: because it doesn't fit, is the beginning of one that
        is held, or is known for the most part, which would have to be copied at once.
        """
        length, _ = self.match(window)
        size = len(window.ids)
        if not 0 < size <= self.max_tokens or length == size:
            return None
        if known > COPIED_AT_ONCE and 2 * known > size:
            return None
        while self.tokens + size > self.max_tokens:
            self._forget(next(iter(self._entries)))
        return PrefixCopy(window)

    @torch.inference_mode()
    def add(self, copy: PrefixCopy, logits: Tensor) -> None:
        """Keep a window that was read to its end, and the logits after it, (1, V)."""
        length, held = self.match(copy.window)
        if held is not None and length == len(held.ids):  # a beginning of this one
            self._forget(held)
        assert copy.keys is not None
        assert copy.values is not None
        self._entries[copy.window] = Prefix(copy.keys, copy.values, logits.clone())
        self.tokens += len(copy.window.ids)

    def clear(self) -> None:
        self._entries.clear()
        self.tokens = 0

    def _forget(self, key: Window) -> None:
        del self._entries[key]
        self.tokens -= len(key.ids)
