"""Batch: texts that are decoded together, one token each at a time.

On a GPU the next step is launched before the last token is read back, so that the GPU never waits
for the host: the texts take the token while the step runs. The step's result is dropped where the
token ends every text. The loop reads nothing else back until the texts have ended.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2ml_torch.generation.engine import Engine
from gpt2ml_torch.generation.finite import check_logits, non_finite_logits
from gpt2ml_torch.generation.sampler import Sampler, SamplingParams
from gpt2ml_torch.generation.stats import Stats
from gpt2ml_torch.generation.text import Text
from gpt2ml_torch.generation.transfers import HostCopy, to_device


class _Chosen(NamedTuple):
    """The next token of each row, (B,)."""

    ids: Tensor
    on_host: HostCopy
    logprobs: Tensor | None


class Batch:
    """Texts that are decoded together: row r of every tensor belongs to `texts[r]`."""

    def __init__(
        self, engine: Engine, texts: list[Text], *, logprobs: bool = False, stats: Stats
    ) -> None:
        self._engine = engine
        self._texts = texts
        self._logprobs = logprobs
        self._stats = stats
        self._unread_logprobs: list[tuple[list[tuple[int, Text]], Tensor]] = []
        self._sampler = sampler_for(engine, texts, rows=engine.padded_rows(len(texts)))
        needed = max(len(text.ids) - text.start for text in texts)
        # Compiled steps may have a graph for each length: one from the start beats several on the
        # way. Elsewhere the cache grows with the text, a block of slots at a time.
        if engine.compiled or engine.on_kernels:
            needed = max(len(text.ids) - text.start + text.to_come for text in texts)
        else:
            needed += 1
        self._cache = engine.new_cache(len(texts), min(needed, engine.limit))

    def write(self) -> Iterator[tuple[Text, str]]:
        """Decode to the end of every text; yields what each token adds."""
        began = time.perf_counter()
        logits = self._read_prompts()
        self._stats.prompt_seconds += time.perf_counter() - began
        for number in itertools.count():
            began = time.perf_counter()
            chosen = self._choose(logits)
            ahead = self._decode(chosen.ids, ahead=1) if self._runs_ahead() else None
            pieces = list(self._put(chosen))
            busy = time.perf_counter() - began
            yield from pieces
            began = time.perf_counter() - busy
            going = sum(not text.finished for text in self._texts)
            if not going:
                return
            logits = self._step(chosen.ids) if ahead is None else self._drop_finished(ahead)
            if number:
                self._count(1, going, began)

    def _step(self, ids: Tensor) -> Tensor:
        """Logits after these ids, (B,) -> (B', V), which the texts hold already."""
        ids = self._drop_finished(ids)
        self._make_room()
        return self._slide(self._decode(ids))

    def _runs_ahead(self) -> bool:
        """Whether the next step is launched before the last tokens are read back."""
        going = [text for text in self._texts if not text.finished]
        room = max(text.position for text in going) + 1 < self._cache.length
        return self._engine.on_cuda and room and max(text.to_come for text in going) > 1

    def _put(self, chosen: _Chosen) -> Iterator[tuple[Text, str]]:
        """Hand chosen tokens to the texts."""
        written: list[tuple[int, Text]] = []
        for row, (text, id_) in enumerate(zip(self._texts, chosen.on_host.tolist(), strict=False)):
            if text.finished:
                continue
            if id_ < 0:
                raise non_finite_logits(self._engine.model)
            count = text.count
            piece = text.put(id_)
            if text.count > count:
                written.append((row, text))
            yield text, piece
        if chosen.logprobs is not None:
            self._unread_logprobs.append((written, chosen.logprobs))
            if all(text.finished for text in self._texts):
                self._read_logprobs()

    def _read_logprobs(self) -> None:
        """Hand all log-probabilities to the texts, whose rows stay the same between two calls."""
        if not self._unread_logprobs:
            return
        values = torch.stack([logprobs for _, logprobs in self._unread_logprobs]).tolist()
        for (written, _), step_values in zip(self._unread_logprobs, values, strict=True):
            for row, text in written:
                text.logprobs.append(step_values[row])
        self._unread_logprobs.clear()

    def _count(self, steps: int, tokens: int, began: float) -> None:
        self._stats.steps += steps
        self._stats.step_tokens += tokens
        self._stats.step_seconds += time.perf_counter() - began

    def _read_prompts(self) -> Tensor:
        """Logits after each prompt, (B, V); equal prompts are read once."""
        read: dict[tuple[int, ...], tuple[int, Tensor]] = {}
        rows = []
        for row, text in enumerate(self._texts):
            window = tuple(text.ids[text.start :])
            if window not in read:
                read[window] = row, self._engine.read_into(self._cache, row, window)
                self._stats.prompt_tokens += len(window)
            source, logits = read[window]
            if source != row:
                self._cache.copy_row(source, self._cache, row, len(window))
            rows.append(logits)
        rows += [rows[0]] * (self._cache.batch_size - len(rows))
        return torch.cat(rows)

    @torch.inference_mode()
    def _choose(self, logits: Tensor) -> _Chosen:
        if not self._engine.on_cuda:  # sampling relies on numbers
            check_logits(self._engine.model, logits[: len(self._texts)])
        ids = self._sampler.choose(logits)
        on_host = self._to_host(logits, ids)
        if any(text.constraints.bad_words for text in self._texts):
            ids, on_host = self._avoid_bad_words(logits, ids, on_host)
        self._sampler.advance(ids)
        return _Chosen(ids, on_host, logprobs_of(logits, ids) if self._logprobs else None)

    def _to_host(self, logits: Tensor, ids: Tensor) -> HostCopy:
        """The ids on their way to the host: on a GPU -1 where a logit is not finite, so that to
        notice it takes no read of its own.
        """
        if self._engine.on_cuda:
            ids = ids.where(logits.isfinite().all(-1), -1)
        return HostCopy(ids)

    def _avoid_bad_words(
        self, logits: Tensor, ids: Tensor, on_host: HostCopy
    ) -> tuple[Tensor, HostCopy]:
        """Choose again, without the ids that would complete a bad word, until none does."""
        blocked = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        tried: set[tuple[int, int]] = set()
        while True:
            offenders = {
                (row, id_)
                for row, (text, id_) in enumerate(zip(self._texts, on_host.tolist(), strict=False))
                if not text.finished and id_ >= 0 and (row, id_) not in tried and text.offends(id_)
            }
            if not offenders:
                return ids, on_host
            tried |= offenders
            for row, id_ in offenders:
                blocked[row, id_] = True
            ids = self._sampler.choose(logits, blocked=blocked)
            on_host = self._to_host(logits, ids)

    def _decode(self, ids: Tensor, *, ahead: int = 0) -> Tensor:
        """Logits after these ids, (B,) -> (B, V), `ahead` tokens past the end of the texts."""
        last = self._cache.length - 1
        places = [min(text.position + ahead, last) for text in self._texts]
        places += [0] * (len(ids) - len(places))
        positions = to_device(places, ids.device)[:, None]
        return self._engine.decode(ids[:, None], positions, self._cache)[:, -1]

    def _drop_finished(self, rows: Tensor) -> Tensor:
        """Go on with fewer rows, of this tensor too, where that is a smaller batch."""
        going = [row for row, text in enumerate(self._texts) if not text.finished]
        padded = self._engine.padded_rows(len(going))
        if padded >= self._cache.batch_size:
            return rows
        self._read_logprobs()
        smaller = self._engine.new_cache(len(going), self._cache.length)
        for to, row in enumerate(going):
            slots = min(self._texts[row].position + 1, self._cache.length)
            self._cache.copy_row(row, smaller, to, slots)
        self._cache = smaller
        self._sampler.select(going, padded)
        self._texts = [self._texts[row] for row in going]
        return rows[to_device([*going, *[going[0]] * (padded - len(going))], rows.device)]

    def _make_room(self) -> None:
        """Grow the cache where the next token needs a slot more."""
        needed = min(max(text.position for text in self._texts) + 1, self._engine.limit)
        if needed <= self._cache.length:
            return
        grown = self._engine.new_cache(len(self._texts), needed)
        for row in range(len(self._texts)):
            self._cache.copy_row(row, grown, row, self._cache.length)
        self._cache = grown

    def _slide(self, logits: Tensor) -> Tensor:
        """Where a text has outgrown the model's window, read its end again, from position 0."""
        for row, text in enumerate(self._texts):
            if text.finished or text.position < self._engine.limit:
                continue
            text.slide(self._engine.limit)
            logits = logits.clone()
            logits[row] = self._engine.read_into(self._cache, row, text.ids[text.start :])[0]
        return logits


def sampler_for(engine: Engine, texts: Sequence[Text], *, rows: int) -> Sampler:
    """A sampler whose first rows are these texts'."""
    model = engine.model
    sampler = Sampler(
        rows, vocab_size=model.config.vocab_size, device=model.device, per_row=engine.on_cuda
    )
    for row, text in enumerate(texts):
        sampler.add(
            row,
            text.constraints,
            SamplingParams.of(text.config),
            key=text.key,
            history=text.ids,
            step=text.count,
        )
    return sampler


def logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The log-probabilities of chosen ids under the model itself, (B, V), (B,) -> (B,)."""
    return logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
