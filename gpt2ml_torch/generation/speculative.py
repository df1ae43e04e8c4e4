"""Speculative decoding: guess tokens from earlier text, check all of them in one step.

Token t of a row is the same function of the logits and the row's random stream whether it was
guessed or not: the guess is kept exactly where it is what plain decoding chooses. So greedy and
sampled texts are those of plain decoding, up to the rounding of larger matrix products.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpt2ml_torch.generation.batch import Batch, logprobs_of
from gpt2ml_torch.generation.text import Text

LONGEST_MATCH = 4


class SpeculativeBatch(Batch):
    """A batch of one text, several tokens at a time where earlier text suggests them."""

    def write(self) -> Iterator[tuple[Text, str]]:
        (text,) = self._texts
        began = time.perf_counter()
        logits = self._read_prompts()
        self._stats.prompt_seconds += time.perf_counter() - began
        guesses: list[int] = []
        while True:
            began, before = time.perf_counter(), text.count
            for place, row_logits in enumerate(logits.unbind(1) if logits.ndim == 3 else [logits]):
                yield from self._choose_one(row_logits)
                if text.finished:
                    return
                if place >= len(guesses) or text.ids[-1] != guesses[place]:
                    break
            self._make_room()
            guesses = self._guess(text)
            logits = self._check(text, guesses) if guesses else self._plain(text)
            self._count(1, text.count - before, began)

    def _choose_one(self, logits: Tensor) -> Iterator[tuple[Text, str]]:
        with torch.inference_mode():
            ids = self._choose(logits)
            logprobs = [logprobs_of(logits, ids)] if self._logprobs else []
        return self._put(ids[None], logprobs)

    def _guess(self, text: Text) -> list[int]:
        """Always as many, so that there is one size to compile; or none."""
        size = self._config.prompt_lookup_num_tokens
        room = min(self._cache.length, self._engine.limit) - 1 - text.position
        guesses = look_up(text.ids[text.start :], size) if room >= size else []
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
