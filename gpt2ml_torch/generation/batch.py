"""Batch: texts that are decoded together, one token each at a time.

On a GPU a step chooses the next token itself, in the same graph, and is launched before the last
token is read back, so that the GPU never waits for the host: the texts take the token while the
step runs. The step's result is dropped where the token ends every text. The loop reads nothing else
back until the texts have ended. Where the host has to see a token before the next can be chosen,
for bad words and repeated n-grams, the step ends at its logits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpt2ml_torch.generation.choice import Chosen, logprobs_of, report
from gpt2ml_torch.generation.engine import Engine
from gpt2ml_torch.generation.finite import check_logits, non_finite_logits
from gpt2ml_torch.generation.sampler import Sampler, SamplingParams
from gpt2ml_torch.generation.stats import Stats
from gpt2ml_torch.generation.text import Text
from gpt2ml_torch.generation.transfers import HostCopy, to_device


class _Tokens:
    """Chosen tokens on their way to the host."""

    def __init__(self, chosen: Chosen) -> None:
        self.chosen = chosen
        self.on_host = HostCopy(chosen.reported)


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
        for row, text in enumerate(texts):
            self._cache.use_adapter(row, engine.adapters.number(text.config.adapter))

    def write(self) -> Iterator[tuple[Text, str]]:
        """Decode to the end of every text; yields what each token adds."""
        began = time.perf_counter()
        logits = self._read_prompts()
        self._stats.prompt_seconds += time.perf_counter() - began
        tokens = self._choose(logits)
        for number in itertools.count():
            began = time.perf_counter()
            ahead = self._launch(tokens.chosen.ids)
            pieces = list(self._put(tokens.chosen, tokens.on_host.tolist()))
            busy = time.perf_counter() - began
            yield from pieces
            began = time.perf_counter() - busy
            going = sum(not text.finished for text in self._texts)
            if not going:
                return
            tokens = self._follow(tokens.chosen.ids, ahead)
            if number:
                self._count(1, going, began)

    def _launch(self, ids: Tensor) -> Tensor | _Tokens | None:
        """The step after these ids, (B,), which the texts don't hold yet: the tokens that it
        chooses, or its logits where the texts have to see the ids first. None where it has to wait.
        """
        if not self._runs_ahead():
            return None
        if self._host_decides:
            return self._decode(ids, ahead=1)
        return self._advance(
            self._engine.decode_and_choose(
                ids[:, None],
                self._positions(len(ids), ahead=1),
                self._cache,
                self._sampler.state(),
                logprobs=self._logprobs,
            )
        )

    def _follow(self, ids: Tensor, ahead: Tensor | _Tokens | None) -> _Tokens:
        """The tokens after these ids, (B,), which the texts hold now; `ahead` is from `_launch`."""
        if ahead is None:
            return self._choose(self._step(ids))
        index = self._drop_finished()
        if isinstance(ahead, Tensor):
            return self._choose(ahead if index is None else ahead[index])
        if index is None:
            return ahead
        return _Tokens(ahead.chosen.map(lambda rows: rows[index]))

    @property
    def _host_decides(self) -> bool:
        """Whether a token can only be chosen when the host has seen the one before."""
        rules = [text.constraints for text in self._texts]
        return any(rule.bad_words or rule.no_repeat_ngram_size for rule in rules)

    def _step(self, ids: Tensor) -> Tensor:
        """Logits after these ids, (B,) -> (B', V), which the texts hold already."""
        index = self._drop_finished()
        ids = ids if index is None else ids[index]
        self._make_room()
        return self._slide(self._decode(ids))

    def _runs_ahead(self) -> bool:
        """Whether the next step is launched before the last tokens are read back."""
        going = [text for text in self._texts if not text.finished]
        room = max(text.position for text in going) + 1 < self._cache.length
        return self._engine.on_cuda and room and max(text.to_come for text in going) > 1

    def _put(self, chosen: Chosen, ids: Sequence[int]) -> Iterator[tuple[Text, str]]:
        """Hand chosen tokens, `ids` on the host, to the texts."""
        written: list[tuple[int, Text]] = []
        for row, (text, id_) in enumerate(zip(self._texts, ids, strict=False)):
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
        read: dict[tuple[str | None, tuple[int, ...]], tuple[int, Tensor]] = {}
        rows = []
        for row, text in enumerate(self._texts):
            window = tuple(text.ids[text.start :])
            key = text.config.adapter, window
            if key not in read:
                read[key] = row, self._engine.read_into(self._cache, row, window)
                self._stats.prompt_tokens += len(window)
            source, logits = read[key]
            if source != row:
                self._cache.copy_row(source, self._cache, row, len(window))
            rows.append(logits)
        rows += [rows[0]] * (self._cache.batch_size - len(rows))
        return torch.cat(rows)

    @torch.inference_mode()
    def _choose(self, logits: Tensor) -> _Tokens:
        if not self._engine.on_cuda:  # sampling relies on numbers
            check_logits(self._engine.model, logits[: len(self._texts)])
        tokens = self._tokens(logits, self._sampler.choose(logits))
        if any(text.constraints.bad_words for text in self._texts):
            tokens = self._avoid_bad_words(logits, tokens)
        self._sampler.advance(tokens.chosen.ids)
        return tokens

    @torch.inference_mode()
    def _advance(self, chosen: Chosen) -> _Tokens:
        """Let the sampler go on from these tokens."""
        tokens = _Tokens(chosen)
        self._sampler.advance(chosen.ids)
        return tokens

    def _tokens(self, logits: Tensor, ids: Tensor) -> _Tokens:
        if self._engine.on_cuda:
            return _Tokens(report(logits, ids, logprobs=self._logprobs))
        return _Tokens(Chosen(ids, ids, logprobs_of(logits, ids) if self._logprobs else None))

    def _avoid_bad_words(self, logits: Tensor, tokens: _Tokens) -> _Tokens:
        """Choose again, without the ids that would complete a bad word, until none does."""
        blocked = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        tried: set[tuple[int, int]] = set()
        while True:
            ids = tokens.on_host.tolist()
            offenders = {
                (row, id_)
                for row, (text, id_) in enumerate(zip(self._texts, ids, strict=False))
                if not text.finished and id_ >= 0 and (row, id_) not in tried and text.offends(id_)
            }
            if not offenders:
                return tokens
            tried |= offenders
            for row, id_ in offenders:
                blocked[row, id_] = True
            tokens = self._tokens(logits, self._sampler.choose(logits, blocked=blocked))

    def _decode(self, ids: Tensor, *, ahead: int = 0) -> Tensor:
        """Logits after these ids, (B,) -> (B, V), `ahead` tokens past the end of the texts."""
        positions = self._positions(len(ids), ahead=ahead)
        return self._engine.decode(ids[:, None], positions, self._cache)[:, -1]

    def _positions(self, rows: int, *, ahead: int) -> Tensor:
        """The position of the last token of each text, or `ahead` tokens on, (B, 1)."""
        last = self._cache.length - 1
        places = [min(text.position + ahead, last) for text in self._texts]
        places += [0] * (rows - len(places))
        return to_device(places, self._cache.keys.device)[:, None]

    def _drop_finished(self) -> Tensor | None:
        """Go on with fewer rows where that is a smaller batch: which ones, in their order."""
        going = [row for row, text in enumerate(self._texts) if not text.finished]
        padded = self._engine.padded_rows(len(going))
        if padded >= self._cache.batch_size:
            return None
        self._read_logprobs()
        smaller = self._engine.new_cache(len(going), self._cache.length)
        for to, row in enumerate(going):
            slots = min(self._texts[row].position + 1, self._cache.length)
            self._cache.copy_row(row, smaller, to, slots)
        self._cache = smaller
        self._sampler.select(going, padded)
        self._texts = [self._texts[row] for row in going]
        return to_device([*going, *[going[0]] * (padded - len(going))], smaller.keys.device)

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
