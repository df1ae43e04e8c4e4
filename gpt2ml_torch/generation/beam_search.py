"""Beam search: the most probable texts rather than drawn ones.

A hypothesis ends at a stop string, an end token or the maximum length; its score is its summed
log-probability divided by its length to the power `length_penalty` (0 is bert4keras's plain sum).
The search ends when no beam can still beat the worst of the hypotheses wanted.

The host reads the best few continuations of a step, all at once: ids, and the bits of their sums.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpt2ml_torch.generation.batch import sampler_for
from gpt2ml_torch.generation.engine import Engine
from gpt2ml_torch.generation.finite import check_logits, non_finite_logits
from gpt2ml_torch.generation.text import Text
from gpt2ml_torch.generation.transfers import HostCopy, to_device
from gpt2ml_torch.kv_cache import KVCache


class BeamSearch:
    """One prompt's search; `search` returns the best texts, best first, finished.

    Scores are natural logarithms of probabilities after bans, forced tokens and the repetition
    penalty.
    """

    def __init__(self, engine: Engine, prompt: Text) -> None:
        self._engine = engine
        self._config = prompt.config
        self._beams = [prompt]
        self._scores = [0.0]
        self._sampler = sampler_for(engine, self._beams, rows=1)
        self._finished: list[Text] = []
        self._spare: KVCache | None = None

    def search(self) -> list[Text]:
        config = self._config
        prompt = self._beams[0]
        logits = self._read([prompt])
        for _ in range(config.max_new_tokens):
            logits = logits[: len(self._beams)]  # what pads the batch is no beam
            parents = self._extend(self._totals(logits), logits.shape[-1])
            if not self._beams or self._is_settled():
                break
            self._choose(parents)
            logits = self._step(parents)
        return self._finished[: config.num_return_sequences]

    def _choose(self, parents: list[int]) -> None:
        """Let row r of the sampler go on from parents[r], by the last token of beam r."""
        histories = [text.ids for text in self._beams]
        self._sampler.select(parents, len(parents), histories=histories)
        last = [text.ids[-1] for text in self._beams]
        self._sampler.advance(to_device(last, self._engine.model.device))

    @torch.inference_mode()
    def _totals(self, logits: Tensor) -> Tensor:
        """The score of each continuation of each beam, (beams, V) -> (beams * V,) float64; on a
        GPU all NaN where a logit is not finite, which shows when they are read.
        """
        scores = to_device(self._scores, logits.device, torch.float64)[:, None]
        totals = scores + self._sampler.process(logits).log_softmax(-1).double()
        if self._engine.on_cuda:
            totals = totals.where(logits.isfinite().all(), torch.nan)
        else:
            check_logits(self._engine.model, logits)
        return totals.flatten()

    def _ranked(self, totals: Tensor) -> Iterator[tuple[float, int]]:
        """The continuations, best first, each as its score and place; of equal ones the first
        place first. A few are read at once, and more where those are not enough.
        """
        count, known = 4 * self._config.num_beams, 0
        while known < len(totals):
            count = min(count, len(totals))
            places = self._best_places(totals, count)
            bits = totals[places].view(torch.int64)
            read: list[int] = HostCopy(torch.cat([places, bits])).tolist()
            scores = struct.unpack(f"{count}d", struct.pack(f"{count}q", *read[count:]))
            if math.isnan(scores[0]):
                raise non_finite_logits(self._engine.model)
            yield from zip(scores[known:], read[known:count], strict=True)
            count, known = 16 * count, count

    def _best_places(self, totals: Tensor, count: int) -> Tensor:
        """Where the best are, best first, as a stable sort puts them."""
        if self._engine.on_cuda or count == len(totals):
            return totals.sort(descending=True, stable=True).indices[:count]
        # The worst that counts, and what ties with it, are found sooner than all are sorted.
        places = (totals >= totals.topk(count).values[-1]).nonzero()[:, 0]
        return places[totals[places].sort(descending=True, stable=True).indices[:count]]

    def _extend(self, totals: Tensor, vocab_size: int) -> list[int]:
        """Take the best continuations, (beams * V,); returns the rows that the new beams extend."""
        width = self._config.num_beams
        last = self._beams[0].to_come == 1  # every continuation ends its text
        beams: list[Text] = []
        scores: list[float] = []
        parents: list[int] = []
        for rank, (total, place) in enumerate(self._ranked(totals)):
            if total == -torch.inf or len(beams) == width or (last and rank == width):
                break
            row, id_ = divmod(place, vocab_size)
            if self._beams[row].offends(id_):
                continue
            text = self._beams[row].copy()
            text.put(id_)
            if text.finished:
                # As in transformers: an end counts only where it is among the `width` best.
                if rank < width:
                    self._finish(text, total)
                continue
            beams.append(text)
            scores.append(total)
            parents.append(row)
        self._beams, self._scores = beams, scores
        return parents

    def _finish(self, text: Text, total: float) -> None:
        # An end token is no part of the ids, but its probability is part of the sum.
        length = text.count + (text.ended_by_token)
        text.score = total / max(length, 1) ** self._config.length_penalty
        self._finished.append(text)
        self._finished.sort(key=lambda text: text.score or 0.0, reverse=True)
        del self._finished[self._config.num_beams :]

    def _is_settled(self) -> bool:
        """Whether no beam can still come among the hypotheses that are returned."""
        wanted = self._config.num_return_sequences
        if len(self._finished) < wanted:
            return False
        # Sums only fall; a positive penalty favours the longest text, a negative one the shortest.
        penalty = self._config.length_penalty
        length = self._config.max_new_tokens if penalty > 0 else self._beams[0].count + 1
        worst = self._finished[wanted - 1].score
        return worst is not None and max(self._scores) / length**penalty <= worst

    # -- the model --------------------------------------------------------------------------------

    def _read(self, texts: list[Text]) -> Tensor:
        logits, self._cache = self._engine.read(
            texts[0].ids[texts[0].start :], adapter=self._config.adapter
        )
        return logits

    def _step(self, parents: list[int]) -> Tensor:
        """Logits after the beams' last tokens; each beam takes its parent's row of the cache."""
        position = self._beams[0].position
        engine = self._engine
        if position >= engine.limit:
            return self._slide()
        self._follow(parents, position)
        cache = self._cache
        padding = cache.batch_size - len(parents)
        device = cache.keys.device
        last = [text.ids[-1] for text in self._beams]
        ids = to_device([*last, *[0] * padding], device)[:, None]
        positions = torch.full_like(ids, position)
        return engine.decode(ids, positions, cache)[:, -1]

    def _follow(self, parents: list[int], position: int) -> None:
        """Copy row parents[r] of the cache to row r, with room for one more slot."""
        rows = self._engine.padded_rows(len(parents))
        fits = self._cache.batch_size == rows and self._cache.length > position
        if fits and parents == list(range(len(parents))):
            return
        target, self._spare = self._spare, None  # two caches take turns
        if target is None or target.keys.shape[1] != rows or target.length <= position:
            to_come = self._config.max_new_tokens - self._beams[0].count
            target = self._engine.new_cache(
                len(parents), position + 1 + to_come, adapter=self._config.adapter
            )
        self._copy(target.keys, self._cache.keys, parents, position)
        self._copy(target.values, self._cache.values, parents, position)
        if self._cache.batch_size == rows and self._cache.length == target.length:
            self._spare = self._cache
        self._cache = target

    @staticmethod
    @torch.inference_mode()
    def _copy(target: Tensor, source: Tensor, parents: list[int], length: int) -> None:
        for row, parent in enumerate(parents):
            target[:, row, :length] = source[:, parent, :length]

    def _slide(self) -> Tensor:
        """Read the end of each beam again, from position 0, when the window is full."""
        rows = []
        cache = self._engine.new_cache(
            len(self._beams), self._engine.limit, adapter=self._config.adapter
        )
        for row, text in enumerate(self._beams):
            text.slide(self._engine.limit)
            rows.append(self._engine.read_into(cache, row, text.ids[text.start :]))
        self._cache = cache
        return torch.cat(rows)


def search_all(engine: Engine, texts: Sequence[Text]) -> Iterator[tuple[Text, str]]:
    """Beam search for each prompt; its best texts take the places of the prompt's copies."""
    while texts:
        count = texts[0].config.num_return_sequences
        found = BeamSearch(engine, texts[0].copy()).search()
        for text, result in zip(texts[:count], found, strict=False):
            text.become(result)
            yield text, text.written
        texts = texts[count:]
