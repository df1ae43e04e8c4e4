"""From a step's logits to each row's next token: one function of tensors, which a step can hold.

Nothing in it depends on a value, so that a CUDA graph can replay it: every rule that some row has
runs for all rows.

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
    """What the next token of each row depends on, except for its logits; None leaves a rule out."""

    knobs: sampling.Knobs  # (B, 1) each
    keys: Tensor  # (B,) int64, the random streams
    steps: Tensor  # (B,) int64, the numbers of the tokens in them
    blocked: Tensor  # (B, V) bool, never chosen
    forced: Tensor  # (B,) int64, chosen whatever else holds; -1 where nothing is forced
    seen: Tensor | None = None  # (B, V) bool, what the repetition penalty applies to
    penalty: Tensor | None = None  # (B, 1) float32
    amounts: Amounts | None = None

    @property
    def rules(self) -> tuple[bool, ...]:
        """Which rules run: states of the same rules and rows can share a compiled step."""
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
    """The chosen ids, (B,), with what else is asked of these logits, (B, V).

    That a logit is not finite shows in the ids as the host reads them, so that to notice it takes
    no read of its own.
    """
    reported = ids.where(logits.isfinite().all(-1), -1)
    return Chosen(ids, reported, logprobs_of(logits, ids) if logprobs else None)


def logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The log-probabilities of chosen ids under the model itself, (B, V), (B,) -> (B,)."""
    return logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
