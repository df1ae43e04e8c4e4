"""Adjust a batch's logits: a bias for each token, and penalties for tokens written before.

Source: OpenAI's API reference, `logit_bias`, `presence_penalty` and `frequency_penalty`. Penalties
count the tokens that the model wrote, not the prompt.

Shapes:
    B  batch rows       V  vocabulary
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2ml_torch.generation.constraints import Constraints


class Amounts(NamedTuple):
    """How much the logits of each row change."""

    bias: Tensor  # (B, V) float32
    counts: Tensor  # (B, V) float32, how often the row wrote each token
    presence: Tensor  # (B, 1) float32, subtracted once from every token that was written
    frequency: Tensor  # (B, 1) float32, subtracted for each time that a token was written


def adjust(logits: Tensor, amounts: Amounts) -> Tensor:
    """The adjusted logits, (B, V) float32."""
    bias, counts, presence, frequency = amounts
    penalty = presence * (counts > 0) + frequency * counts
    return logits.float() + bias - penalty


class Adjustments:
    """For each row a bias of every token, its two penalties, and how often it wrote each token."""

    def __init__(self, rows: int, *, vocab_size: int, device: torch.device) -> None:
        self._bias = torch.zeros(rows, vocab_size, device=device)
        self._counts = torch.zeros(rows, vocab_size, device=device)
        self._presence = torch.zeros(rows, 1, device=device)
        self._frequency = torch.zeros(rows, 1, device=device)

    @staticmethod
    def needed(constraints: Constraints) -> bool:
        """Whether a row of these constraints has anything to adjust."""
        penalties = constraints.presence_penalty, constraints.frequency_penalty
        return bool(constraints.logit_bias) or penalties != (0, 0)

    def set(self, row: int, constraints: Constraints, written: Sequence[int]) -> None:
        """Set a row's constraints, and count the tokens that it has `written` so far."""
        self._presence[row] = constraints.presence_penalty
        self._frequency[row] = constraints.frequency_penalty
        self._bias[row] = 0
        for id_, bias in constraints.logit_bias:
            self._bias[row, id_] = bias
        self._counts[row] = 0
        ids = torch.tensor(written, dtype=torch.int64, device=self._counts.device)
        self._counts[row].scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))

    def note(self, ids: Tensor) -> None:
        """Count the chosen tokens, (B,)."""
        self._counts.scatter_add_(1, ids[:, None], torch.ones_like(self._presence))

    def select(self, index: Tensor) -> None:
        """Keep the rows at `index`, (new B,) int64 or bool, in this order."""
        self._bias, self._counts = self._bias[index], self._counts[index]
        self._presence, self._frequency = self._presence[index], self._frequency[index]

    def copy(self) -> Adjustments:
        """An independent copy."""
        other = copy.copy(self)
        other._counts = self._counts.clone()
        return other

    @property
    def amounts(self) -> Amounts:
        """The amounts for the next token."""
        return Amounts(self._bias, self._counts, self._presence, self._frequency)

    def apply(self, logits: Tensor) -> Tensor:
        """The adjusted logits, (B, V) float32."""
        return adjust(logits, self.amounts)
