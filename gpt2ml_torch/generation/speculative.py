"""Speculative decoding: guess some tokens, check all of them in one step of the model.

Token t of a row is the same function of the logits and the row's random stream whether it was
guessed or not: the guess is kept exactly where it is what plain decoding chooses. So greedy and
sampled texts are those of plain decoding, up to the rounding of larger matrix products.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpt2ml_torch.generation.batch import Batch, logprobs_of
from gpt2ml_torch.generation.guessing import Guesser
from gpt2ml_torch.generation.text import Text


class SpeculativeBatch(Batch):
    """A batch of one text: several tokens at a time, where the `guesses` guesses are right."""

    def __init__(self, *arguments: Any, guesser: Guesser, guesses: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._guesser = guesser
        self._guesses = guesses

    def write(self) -> Iterator[tuple[Text, str]]:
        (text,) = self._texts
        began = time.perf_counter()
        logits, guesses = self._read_prompts(), list[int]()
        self._stats.prompt_seconds += time.perf_counter() - began
        for number in itertools.count():
            began, guessing_steps = time.perf_counter(), self._guesser.steps
            if number:
                self._make_room()
                guesses = self._guess(text)
                logits = self._check(text, guesses) if guesses else self._plain(text)
            pieces = self._take(text, logits, guesses)
            if number > 1:
                self._count(1, len(pieces), began)
                self._stats.assistant_steps += self._guesser.steps - guessing_steps
            yield from pieces
            if text.finished:
                return

    def _take(self, text: Text, logits: Tensor, guesses: list[int]) -> list[tuple[Text, str]]:
        """Choose tokens, one and then another for each guess that was right."""
        pieces: list[tuple[Text, str]] = []
        for place, row_logits in enumerate(logits.unbind(1) if guesses else [logits]):
            pieces += self._choose_one(row_logits)
            if text.finished or text.ids[-1:] != guesses[place : place + 1]:
                break
        return pieces

    def _choose_one(self, logits: Tensor) -> Iterator[tuple[Text, str]]:
        with torch.inference_mode():
            ids = self._choose(logits)
            logprobs = [logprobs_of(logits, ids)] if self._logprobs else []
        return self._put(ids[None], logprobs)

    def _guess(self, text: Text) -> list[int]:
        """Always as many, so that there is one size to compile; or none."""
        size = self._guesses
        if min(self._cache.length, self._engine.limit) - 1 - text.position < size:
            return []
        guesses = self._guesser.guess(text.ids[text.start :], size, self._chooser)
        return guesses + [0] * (size - len(guesses)) if guesses else []

    def _check(self, text: Text, guesses: list[int]) -> Tensor:
        """Logits after the last token and after each guess, (1, 1 + guesses, V)."""
        device = self._cache.keys.device
        ids = torch.tensor([[text.ids[-1], *guesses]], device=device)
        positions = text.position + torch.arange(ids.shape[1], device=device)[None]
        return self._engine.decode(ids, positions, self._cache)

    def _plain(self, text: Text) -> Tensor:
        last = torch.tensor([text.ids[-1]], device=self._cache.keys.device)
        return self._slide(self._decode(last))
