"""Drafts for speculative decoding: tokens from the text itself, or from a cheaper model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gpt2ml_torch.generation.engine import Engine
from gpt2ml_torch.generation.sampler import Sampler

LONGEST_MATCH = 4


class Draft(Protocol):
    """Proposes tokens, which the model then checks."""

    steps: int  # that a model took for the tokens proposed so far

    def propose(self, ids: Sequence[int], size: int, sampler: Sampler) -> list[int]:
        """At most `size` tokens that may follow `ids`, the model's window, as `sampler` chooses."""


class PromptLookup:
    """Proposes what followed the same tokens earlier in the text."""

    steps = 0

    def propose(self, ids: Sequence[int], size: int, sampler: Sampler) -> list[int]:
        return look_up(ids, size)


class DraftModel:
    """Proposes what another model of the same vocabulary writes, with the same random numbers.

    It remembers the text that it read last, so that one more token costs one step.
    """

    def __init__(self, engine: Engine, length: int) -> None:
        """`length`: tokens that it can read; it proposes nothing beyond."""
        self._engine = engine
        self._cache = engine.new_cache(1, length)
        self._read: list[int] = []  # what the cache holds
        self.steps = 0

    def propose(self, ids: Sequence[int], size: int, sampler: Sampler) -> list[int]:
        if len(ids) + size - 1 > self._cache.length:
            return []
        sampler = sampler.copy()
        logits = self._after(list(ids))
        proposed: list[int] = []
        while True:
            chosen = sampler.choose(logits)
            proposed.append(int(chosen[0]))
            if len(proposed) == size:
                return proposed
            sampler.advance(chosen)
            logits = self._decode(proposed[-1:])

    def _after(self, ids: list[int]) -> Tensor:
        """Logits after a text, (1, V), most of which was read before."""
        known = 0
        while known < min(len(ids) - 1, len(self._read)) and ids[known] == self._read[known]:
            known += 1
        # Where the whole draft was right, two tokens are new. Other numbers would have to be
        # compiled.
        if known and len(ids) - known <= 2:
            del self._read[known:]
            return self._decode(ids[known:])
        self._read = ids
        return self._engine.read_into(self._cache, 0, ids)

    def _decode(self, ids: Sequence[int]) -> Tensor:
        """Logits after some more tokens, (1, V)."""
        device = self._cache.keys.device
        positions = len(self._read) + torch.arange(len(ids), device=device)[None]
        logits = self._engine.decode(torch.tensor([ids], device=device), positions, self._cache)
        self._read += ids
        self.steps += 1
        return logits[:, -1]


def look_up(ids: Sequence[int], size: int) -> list[int]:
    """What followed the last time that the end of `ids` occurred before, at most `size` tokens.

    The longest match counts, of equally long ones the latest.
    """
    for length in range(min(LONGEST_MATCH, len(ids) - 1), 0, -1):
        ending = list(ids[-length:])
        for start in range(len(ids) - length - 1, -1, -1):
            if list(ids[start : start + length]) == ending:
                return list(ids[start + length : start + length + size])
    return []
