"""Drafts for speculative decoding: tokens from the text itself, or from a cheaper model.

Drafted tokens stay on the device until the model has checked them: then the host reads both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gpt2ml_torch.generation.engine import Engine
from gpt2ml_torch.generation.sampler import Sampler
from gpt2ml_torch.generation.transfers import to_device
from gpt2ml_torch.model import GPT2ML

LONGEST_MATCH = 4


class Draft(Protocol):
    """Proposes tokens for the model to check."""

    steps: int  # that a model took for the tokens proposed so far

    def launch(self, ids: Sequence[int], size: int, sampler: Sampler) -> Tensor | None:
        """`size` tokens that may follow `ids`, the model's window, as `sampler` chooses, (size,)
        on its device; or None.
        """

    def note(self, drafted: Sequence[int]) -> None:
        """Take note of what the tokens launched last are, once the host has read them."""


class PromptLookup:
    """Proposes what followed the same tokens earlier in the text."""

    steps = 0

    def launch(self, ids: Sequence[int], size: int, sampler: Sampler) -> Tensor | None:
        found = look_up(ids, size)
        if not found:
            return None
        return to_device([*found, *[0] * (size - len(found))], sampler.device)

    def note(self, drafted: Sequence[int]) -> None:
        pass


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
        """As `launch`, on the host; or no token."""
        launched = self.launch(ids, size, sampler)
        drafted: list[int] = [] if launched is None else launched.tolist()
        self.note(drafted)
        return drafted

    @torch.inference_mode()
    def launch(self, ids: Sequence[int], size: int, sampler: Sampler) -> Tensor | None:
        if len(ids) + size - 1 > self._cache.length:
            return None
        sampler = sampler.copy()
        chosen = sampler.choose(self._after(list(ids)))
        drafted = [chosen]
        while len(drafted) < size:
            sampler.advance(chosen)
            chosen = self._next(chosen, len(self._read) + len(drafted) - 1, sampler)
            drafted.append(chosen)
        return torch.cat(drafted)

    def note(self, drafted: Sequence[int]) -> None:
        self._read += drafted[:-1]

    def _next(self, chosen: Tensor, position: int, sampler: Sampler) -> Tensor:
        """The token after one that the host has not read, (1,) -> (1,)."""
        self.steps += 1
        positions = to_device([[position]], chosen.device)
        if self._engine.on_cuda:
            state = sampler.state()
            return self._engine.decode_and_choose(
                chosen[:, None], positions, self._cache, state
            ).ids
        return sampler.choose(self._engine.decode(chosen[:, None], positions, self._cache)[:, -1])

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
        logits = self._engine.decode(to_device([ids], device), positions, self._cache)
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


def check_assistant(assistant: GPT2ML, model: GPT2ML) -> None:
    """Raise `ValueError` for an assistant of other sizes, or on another device, than the model."""
    for what in ("vocab_size", "max_position_embeddings"):
        found, expected = getattr(assistant.config, what), getattr(model.config, what)
        if found != expected:
            raise ValueError(
                f"the assistant's {what} is {found}, the model's {expected}; take a model of the "
                "same vocabulary and length"
            )
    if assistant.device != model.device:
        raise ValueError(
            f"the assistant is on {assistant.device}, the model on {model.device}; move one"
        )
