"""Chooser: the sampling state of a batch on the model's device, and the next token from it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gpt2ml_torch import sampling
from gpt2ml_torch.generation.config import GenerationConfig
from gpt2ml_torch.generation.text import Text


class Chooser:
    """Picks each row's next token by a configuration.

    `banned`, (V,) bool, is never chosen; `end_ids` not before `min_new_tokens`; `forced` maps the
    number of a new token to its id, which is then chosen whatever else holds. With `full`, all
    rules run, those at a neutral value too, so that a compiled graph serves all values.
    """

    def __init__(
        self,
        config: GenerationConfig,
        texts: Sequence[Text],
        *,
        seed: int,
        banned: Tensor,
        end_ids: frozenset[int],
        forced: Mapping[int, int],
        rows: int,
        full: bool = False,
        step: int = 0,
    ) -> None:
        device = banned.device
        self._config = config
        self._texts = list(texts)
        self._banned = banned
        self._end_ids = torch.tensor(sorted(end_ids), dtype=torch.int64, device=device)
        self._forced = forced
        self.knobs = _knobs(config, device, full)
        keys = [sampling.row_key(seed, text.row) for text in texts]
        keys += [0] * (rows - len(keys))
        self._keys = torch.tensor(keys, device=device)
        self._steps = torch.full_like(self._keys, step)
        self._step = step
        self._seen: Tensor | None = None
        if self.knobs.repetition_penalty is not None:
            self._seen = _seen(texts, rows, banned)

    def copy(self) -> Chooser:
        """One that goes its own way from here."""
        other = copy.copy(self)
        other._seen = None if self._seen is None else self._seen.clone()
        return other

    def choose(self, logits: Tensor, *, blocked: Tensor | None = None) -> Tensor:
        """(B, V) -> (B,); `blocked`, (B, V), is not chosen this once. Changes no state."""
        forced = self._forced.get(self._step)
        if forced is not None:
            return torch.full_like(self._keys, forced)
        return sampling.choose(
            logits,
            self.knobs,
            keys=self._keys,
            steps=self._steps,
            blocked=self._blocked(blocked),
            seen=self._seen,
        )

    def process(self, logits: Tensor) -> Tensor:
        """The logits, in float32, after bans and the repetition penalty."""
        return sampling.process(logits, self.knobs, blocked=self._blocked(None), seen=self._seen)

    def advance(self, ids: Tensor) -> None:
        """Take note of the chosen tokens, (B,)."""
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        self._steps = self._steps + 1
        self._step += 1

    def select(self, rows: Sequence[int], padded: int) -> None:
        """Go on with these rows only."""
        index = torch.tensor([*rows, *[rows[0]] * (padded - len(rows))], device=self._keys.device)
        self._texts = [self._texts[row] for row in rows]
        self._keys, self._steps = self._keys[index], self._steps[index]
        self._seen = None if self._seen is None else self._seen[index]

    def _blocked(self, extra: Tensor | None) -> Tensor:
        blocked = self._banned if extra is None else self._banned | extra
        if self._step < self._config.min_new_tokens and len(self._end_ids):
            blocked = blocked.index_fill(-1, self._end_ids, True)
        size = self._config.no_repeat_ngram_size
        if size:
            blocked = blocked | self._repeated(size)
        return blocked

    def _repeated(self, size: int) -> Tensor:
        lengths = [len(text.ids) for text in self._texts]
        history = [text.ids + [0] * (max(lengths) - len(text.ids)) for text in self._texts]
        repeated = sampling.repeated_ngrams(
            torch.tensor(history, device=self._keys.device),
            torch.tensor(lengths, device=self._keys.device),
            size,
            self._banned.shape[-1],
        )
        padding = len(self._keys) - len(history)
        return torch.nn.functional.pad(repeated, (0, 0, 0, padding))


def _knobs(config: GenerationConfig, device: torch.device, full: bool) -> sampling.Knobs:
    def number(value: float, neutral: float, dtype: torch.dtype = torch.float32) -> Tensor | None:
        if value == neutral and not full:
            return None
        return torch.tensor(value, dtype=dtype, device=device)

    grover = config.top_p_rule == "grover"
    penalty = number(config.repetition_penalty, 1.0)
    if not config.samples and not full:
        return sampling.Knobs(repetition_penalty=penalty)
    sample = torch.tensor(config.samples, device=device)
    return sampling.Knobs(
        sample=sample,
        temperature=number(config.temperature or 1.0, 1.0),
        top_k=number(config.top_k or 2**31, 2**31, torch.int64),
        top_p=number(1.0 if grover else config.top_p, 1.0),
        grover_top_p=number(config.top_p, 1.0) if grover else None,
        min_p=number(config.min_p, 0.0),
        typical_p=number(config.typical_p, 1.0),
        repetition_penalty=penalty,
    )


def _seen(texts: Sequence[Text], rows: int, banned: Tensor) -> Tensor:
    seen = torch.zeros(rows, banned.shape[-1], dtype=torch.bool, device=banned.device)
    for row, text in enumerate(texts):
        seen[row, torch.tensor(text.ids, device=banned.device)] = True
    return seen
