"""Speculative decoding: draft some tokens, check all of them in one step of the model.

Token t of a row is the same function of the logits and the row's random stream whether it was
drafted or not: a drafted token is kept exactly where it is what plain decoding chooses. So greedy
and sampled texts are the ones of plain decoding, up to the rounding of larger matrix products.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from gpt2ml_torch.generation.batch import Batch
from gpt2ml_torch.generation.draft import Draft
from gpt2ml_torch.generation.engine import Engine
from gpt2ml_torch.generation.stats import Stats
from gpt2ml_torch.generation.text import Text
from gpt2ml_torch.generation.transfers import to_device


class SpeculativeBatch(Batch):
    """A batch of one text: several tokens at a time, where the `size` drafted ones are right."""

    def __init__(
        self,
        engine: Engine,
        text: Text,
        *,
        draft: Draft,
        size: int,
        logprobs: bool = False,
        stats: Stats,
    ) -> None:
        super().__init__(engine, [text], logprobs=logprobs, stats=stats)
        self._draft = draft
        self._size = size

    def write(self) -> Iterator[tuple[Text, str]]:
        (text,) = self._texts
        began = time.perf_counter()
        logits, drafted = self._read_prompts(), list[int]()
        self._stats.prompt_seconds += time.perf_counter() - began
        for number in itertools.count():
            began, draft_steps = time.perf_counter(), self._draft.steps
            if number:
                self._make_room()
                drafted = self._propose(text)
                logits = self._check(text, drafted) if drafted else self._plain(text)
            pieces = self._take(text, logits, drafted)
            if number > 1:
                self._count(1, len(pieces), began)
                self._stats.assistant_steps += self._draft.steps - draft_steps
            yield from pieces
            if text.finished:
                return

    def _take(self, text: Text, logits: Tensor, drafted: list[int]) -> list[tuple[Text, str]]:
        """Choose tokens, one and then another for each drafted one that was right."""
        pieces: list[tuple[Text, str]] = []
        for place, row_logits in enumerate(logits.unbind(1) if drafted else [logits]):
            pieces += self._put(self._choose(row_logits))
            if text.finished or text.ids[-1:] != drafted[place : place + 1]:
                break
        return pieces

    def _propose(self, text: Text) -> list[int]:
        """Always as many, so that there is one size to compile; or none."""
        size = self._size
        if min(self._cache.length, self._engine.limit) - 1 - text.position < size:
            return []
        drafted = self._draft.propose(text.ids[text.start :], size, self._sampler)
        return drafted + [0] * (size - len(drafted)) if drafted else []

    def _check(self, text: Text, drafted: list[int]) -> Tensor:
        """Logits after the last token and after each drafted one, (1, 1 + size, V)."""
        device = self._cache.keys.device
        ids = to_device([[text.ids[-1], *drafted]], device)
        positions = text.position + torch.arange(ids.shape[1], device=device)[None]
        return self._engine.decode(ids, positions, self._cache)

    def _plain(self, text: Text) -> Tensor:
        return self._slide(self._decode(to_device(text.ids[-1:], self._cache.keys.device)))
