"""Batch: texts that are decoded together, one token each at a time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpt2ml_torch.generation.engine import Engine
from gpt2ml_torch.generation.finite import check_logits
from gpt2ml_torch.generation.sampler import Sampler, SamplingParams
from gpt2ml_torch.generation.stats import Stats
from gpt2ml_torch.generation.text import Text

CUDA_BURST = 8  # tokens decoded between two looks at them, where looking means to wait for the GPU


class Batch:
    """Texts that are decoded together: row r of every tensor belongs to `texts[r]`."""

    def __init__(
        self, engine: Engine, texts: list[Text], *, logprobs: bool = False, stats: Stats
    ) -> None:
        self._engine = engine
        self._texts = texts
        self._logprobs = logprobs
        self._stats = stats
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
            ids, logprobs = self._choose_burst(logits)
            pieces = list(self._put(ids, logprobs))
            busy = time.perf_counter() - began
            yield from pieces
            began = time.perf_counter() - busy
            going = sum(not text.finished for text in self._texts)
            if not going:
                return
            last = self._drop_finished(ids[-1])
            self._make_room()
            logits = self._slide(self._decode(last))
            if number:
                self._count(len(ids), len(ids) * going, began)

    def _put(self, ids: Tensor, logprobs: Sequence[Tensor]) -> Iterator[tuple[Text, str]]:
        """Hand chosen tokens, (n, B), to the texts."""
        for step, step_ids in enumerate(ids.tolist()):
            for row, text in enumerate(self._texts):
                if text.finished:
                    continue
                piece = text.put(step_ids[row])
                if self._logprobs and len(text.logprobs) < text.count:
                    text.logprobs.append(float(logprobs[step][row]))
                yield text, piece

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
    def _choose_burst(self, logits: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Some tokens of each row, (n, B): one on the CPU, several where looking at them costs."""
        if not self._engine.on_cuda:  # sampling relies on numbers
            check_logits(self._engine.model, logits[: len(self._texts)])
        chosen, logprobs = [self._choose(logits)], []
        if self._logprobs:
            logprobs.append(logprobs_of(logits, chosen[-1]))
        for _ in range(self._burst() - 1):
            logits = self._decode(chosen[-1], ahead=len(chosen))
            chosen.append(self._choose(logits))
            if self._logprobs:
                logprobs.append(logprobs_of(logits, chosen[-1]))
        if self._engine.on_cuda:  # the ids are about to be read: it is waited for in any case
            check_logits(self._engine.model, logits[: len(self._texts)])
        return torch.stack(chosen), logprobs

    def _choose(self, logits: Tensor) -> Tensor:
        ids = self._sampler.choose(logits)
        if any(text.constraints.bad_words for text in self._texts):
            ids = self._avoid_bad_words(logits, ids)
        self._sampler.advance(ids)
        return ids

    def _avoid_bad_words(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Choose again, without the ids that would complete a bad word, until none does."""
        blocked = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        while True:
            offenders = [
                (row, id_)
                for row, (text, id_) in enumerate(zip(self._texts, ids.tolist(), strict=False))
                if not text.finished and not blocked[row, id_] and text.offends(id_)
            ]
            if not offenders:
                return ids
            for row, id_ in offenders:
                blocked[row, id_] = True
            ids = self._sampler.choose(logits, blocked=blocked)

    def _burst(self) -> int:
        open_texts = [text for text in self._texts if not text.finished]
        if not self._engine.on_cuda or any(_needs_a_look(text) for text in open_texts):
            return 1
        room = self._cache.length - 1 - max(text.position for text in open_texts)
        left = max(text.to_come for text in open_texts)
        return max(1, min(CUDA_BURST, room, left))

    def _decode(self, ids: Tensor, *, ahead: int = 0) -> Tensor:
        """Logits after these ids, (B,) -> (B, V), `ahead` tokens past the end of the texts."""
        last = self._cache.length - 1
        places = [min(text.position + ahead, last) for text in self._texts]
        places += [0] * (len(ids) - len(places))
        positions = torch.tensor(places, device=ids.device)[:, None]
        return self._engine.decode(ids[:, None], positions, self._cache)[:, -1]

    def _drop_finished(self, ids: Tensor) -> Tensor:
        """Go on with fewer rows where that is a smaller batch."""
        going = [row for row, text in enumerate(self._texts) if not text.finished]
        padded = self._engine.padded_rows(len(going))
        if padded >= self._cache.batch_size:
            return ids
        smaller = self._engine.new_cache(len(going), self._cache.length)
        for to, row in enumerate(going):
            self._cache.copy_row(row, smaller, to, self._texts[row].position)
        self._cache = smaller
        self._sampler.select(going, padded)
        self._texts = [self._texts[row] for row in going]
        return ids[[*going, *[going[0]] * (padded - len(going))]]

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


def _needs_a_look(text: Text) -> bool:
    """Whether what may come next depends on the characters or ids that came last."""
    return bool(text.constraints.bad_words or text.constraints.no_repeat_ngram_size)
