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

    steps: int  # model steps taken for all proposals so far; 0 without a model

    def launch(self, ids: Sequence[int], size: int, sampler: Sampler) -> Tensor | None:
        """Propose `size` tokens, (size,) on the sampler's device, to follow `ids`; or None.

        `ids` are the tokens in the model's window. `sampler` is left unchanged.
        """

    def note(self, drafted: Sequence[int]) -> None:
        """Record the values of the tokens launched last, once the host has read them."""


class PromptLookup:
    """Proposes the tokens that followed the same ending earlier in the text.

    Source: apoorvumang/prompt-lookup-decoding.
    """

    steps = 0

    def launch(self, ids: Sequence[int], size: int, sampler: Sampler) -> Tensor | None:
        found = look_up(ids, size)
        if not found:
            return None
        return to_device([*found, *[0] * (size - len(found))], sampler.device)

    def note(self, drafted: Sequence[int]) -> None:
        pass


class DraftModel:
    """Proposes the tokens that another model of the same vocabulary writes.

    It draws the same random numbers as the main model. Its cache keeps the text read last, so each
    further token costs one step.
    """

    def __init__(self, engine: Engine, length: int) -> None:
        """`length` is the size of the cache in tokens; beyond it, nothing is proposed."""
        self._engine = engine
        self._cache = engine.new_cache(1, length)
        self._read: list[int] = []  # the tokens in the cache
        self.steps = 0

    def propose(self, ids: Sequence[int], size: int, sampler: Sampler) -> list[int]:
        """The proposal of `launch` as a list of ids; empty if there is none."""
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
        """The token after `chosen`, whose value the host does not know yet, (1,) -> (1,)."""
        self.steps += 1
        positions = to_device([[position]], chosen.device)
        if self._engine.on_cuda:
            state = sampler.state()
            return self._engine.decode_and_choose(
                chosen[:, None], positions, self._cache, state
            ).ids
        return sampler.choose(self._engine.decode(chosen[:, None], positions, self._cache)[:, -1])

    def _after(self, ids: list[int]) -> Tensor:
        """Logits after the last of `ids`, (1, V); tokens in the cache are not read again."""
        known = 0
        while known < min(len(ids) - 1, len(self._read)) and ids[known] == self._read[known]:
            known += 1
        # At most two tokens are new, and two only if the whole last draft was right. Each other
        # number of tokens would need a compiled step of its own, so such texts are read afresh.
        if known and len(ids) - known <= 2:
            del self._read[known:]
            return self._decode(ids[known:])
        self._read = ids
        return self._engine.read_into(self._cache, 0, ids)

    def _decode(self, ids: Sequence[int]) -> Tensor:
        """Append `ids` to the cache; logits after the last, (1, V)."""
        device = self._cache.keys.device
        positions = len(self._read) + torch.arange(len(ids), device=device)[None]
        logits = self._engine.decode(to_device([ids], device), positions, self._cache)
        self._read += ids
        self.steps += 1
        return logits[:, -1]


def look_up(ids: Sequence[int], size: int) -> list[int]:
    """At most `size` tokens that followed an earlier occurrence of the end of `ids`.

    The longest match is taken, and the latest of equally long ones. Empty without a match.
    """
    for length in range(min(LONGEST_MATCH, len(ids) - 1), 0, -1):
        ending = list(ids[-length:])
        for start in range(len(ids) - length - 1, -1, -1):
            if list(ids[start : start + length]) == ending:
                return list(ids[start + length : start + length + size])
    return []


def check_assistant(assistant: GPT2ML, model: GPT2ML) -> None:
    """Raise `ValueError` if assistant and model differ in vocabulary, positions or device."""
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
