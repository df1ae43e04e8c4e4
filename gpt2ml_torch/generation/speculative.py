"""Speculative decoding: draft several tokens, then check all of them in one step of the model.

A drafted token is kept only if plain decoding would choose it from the same logits and the same
random stream. So greedy and sampled texts are the ones of plain decoding, up to rounding in larger
matrix products.

On a GPU the host reads results once a step, after the model has checked the drafted tokens.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from gpt2ml_torch.generation.batch import Batch
from gpt2ml_torch.generation.choice import Chosen, report
from gpt2ml_torch.generation.draft import Draft
from gpt2ml_torch.generation.engine import Engine
from gpt2ml_torch.generation.stats import Stats
from gpt2ml_torch.generation.text import Text
from gpt2ml_torch.generation.transfers import HostCopy, to_device


class SpeculativeBatch(Batch):
    """A batch of one text that writes up to `size` + 1 tokens a step: correct drafts and one."""

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
        logits, drafted = self._read_prompts(), None
        self._stats.prompt_seconds += time.perf_counter() - began
        for number in itertools.count():
            began, draft_steps = time.perf_counter(), self._draft.steps
            if number:
                self._make_room()
                drafted = self._propose(text)
                logits = self._plain(text) if drafted is None else self._check(text, drafted)
            pieces = self._take(text, logits, drafted)
            if number > 1:
                self._count(1, len(pieces), began)
                self._stats.assistant_steps += self._draft.steps - draft_steps
            yield from pieces
            if text.finished:
                return

    def _take(self, text: Text, logits: Tensor, drafted: Tensor | None) -> list[tuple[Text, str]]:
        """Choose one token, and one more for each drafted token that was right."""
        pieces: list[tuple[Text, str]] = []
        if drafted is None:
            tokens = self._choose(logits)
            return list(self._put(tokens.chosen, tokens.on_host.tolist()))
        at_once = self._engine.on_cuda and not self._host_decides
        for chosen, id_, draft in (self._all if at_once else self._each)(logits, drafted):
            pieces += self._put(chosen, [id_])
            if text.finished or id_ != draft:
                break
        return pieces

    def _each(self, logits: Tensor, drafted: Tensor) -> Iterator[tuple[Chosen, int, int | None]]:
        """Yield, position by position, the choice, its id and the drafted id (None after the last).

        The choice at a position is made, and the sampler advanced, when the iterator gets there.
        """
        on_host: list[int] = drafted.tolist()
        self._draft.note(on_host)
        for row_logits, draft in zip(logits.unbind(1), [*on_host, None], strict=True):
            tokens = self._choose(row_logits)
            yield tokens.chosen, tokens.on_host.tolist()[0], draft

    @torch.inference_mode()
    def _all(self, logits: Tensor, drafted: Tensor) -> Iterator[tuple[Chosen, int, int | None]]:
        """As `_each`, but choose at all positions, as if every draft were right, and read once."""
        sampler, found = self._sampler.copy(), list[Chosen]()
        for place, row_logits in enumerate(logits.unbind(1)):
            if place:
                sampler.advance(drafted[place - 1 : place])
            found.append(report(row_logits, sampler.choose(row_logits), logprobs=self._logprobs))
        ids = HostCopy(torch.cat([drafted, *(chosen.reported for chosen in found)])).tolist()
        on_host = ids[: len(drafted)]
        self._draft.note(on_host)
        for chosen, id_, draft in zip(found, ids[len(drafted) :], [*on_host, None], strict=True):
            self._sampler.advance(chosen.ids)
            yield chosen, id_, draft

    def _propose(self, text: Text) -> Tensor | None:
        """Draft `size` tokens, or none: always the same number, so one step is compiled for it."""
        size = self._size
        if min(self._cache.length, self._engine.limit) - 1 - text.position < size:
            return None
        return self._draft.launch(text.ids[text.start :], size, self._sampler)

    def _check(self, text: Text, drafted: Tensor) -> Tensor:
        """Logits after the last token and after each drafted one, (1, 1 + size, V)."""
        device = self._cache.keys.device
        ids = torch.cat([to_device(text.ids[-1:], device), drafted])[None]
        positions = text.position + torch.arange(ids.shape[1], device=device)[None]
        return self._engine.decode(ids, positions, self._cache)

    def _plain(self, text: Text) -> Tensor:
        """Logits after the last token, (1, V), in a step without drafted tokens."""
        return self._slide(self._decode(to_device(text.ids[-1:], self._cache.keys.device)))
