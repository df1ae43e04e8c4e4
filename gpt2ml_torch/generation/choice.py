"""Choose each row's next token from a step's logits, in tensor operations alone.

No branch depends on a tensor's value, so a CUDA graph can replay the choice as part of a step. A
rule that any row uses therefore runs for all rows.

Shapes:
    B  batch rows       V  vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2ml_torch import sampling
from gpt2ml_torch.generation.adjustments import Amounts, adjust


class SamplerState(NamedTuple):
    """Everything but the logits that determines each row's next token; None switches a rule off."""

    knobs: sampling.Knobs  # (B, 1) each
    keys: Tensor  # (B,) int64, the random streams
    steps: Tensor  # (B,) int64, each row's position in its random stream
    blocked: Tensor  # (B, V) bool, never chosen
    forced: Tensor  # (B,) int64, chosen regardless of the other rules; -1 where nothing is forced
    seen: Tensor | None = None  # (B, V) bool, the tokens that the repetition penalty applies to
    penalty: Tensor | None = None  # (B, 1) float32
    amounts: Amounts | None = None

    @property
    def rules(self) -> tuple[bool, ...]:
        """Which rules run; states with the same rules and number of rows share a compiled step."""
        given = (self.seen, self.penalty, self.amounts)
        return tuple(value is not None for value in (*self.knobs, *given))


class Chosen(NamedTuple):
    """The next token of each row, (B,)."""

    ids: Tensor
    reported: Tensor  # as the host reads them: -1 where a logit is not finite
    logprobs: Tensor | None  # natural logarithms under the model itself, on request

    def map(self, change: Callable[[Tensor], Tensor]) -> Chosen:
        """The same with every tensor changed."""
        logprobs = None if self.logprobs is None else change(self.logprobs)
        return Chosen(change(self.ids), change(self.reported), logprobs)


def choose(logits: Tensor, state: SamplerState) -> Tensor:
    """The next token of each row, (B, V) -> (B,) int64."""
    if state.amounts is not None:
        logits = adjust(logits, state.amounts)
    scores = sampling.process(logits, blocked=state.blocked, seen=state.seen, penalty=state.penalty)
    ids = sampling.choose(scores, state.knobs, keys=state.keys, steps=state.steps)
    return torch.where(state.forced < 0, ids, state.forced)


def report(logits: Tensor, ids: Tensor, *, logprobs: bool) -> Chosen:
    """The chosen ids, (B,), with their log-probabilities under these logits, (B, V), on request.

    `reported` carries the check for finite logits, so the host needs no separate read for it.
    """
    reported = ids.where(logits.isfinite().all(-1), -1)
    return Chosen(ids, reported, logprobs_of(logits, ids) if logprobs else None)


def logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The log-probabilities of chosen ids under the model itself, (B, V), (B,) -> (B,)."""
    return logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
