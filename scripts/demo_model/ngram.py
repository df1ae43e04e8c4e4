"""Interpolated, modified Kneser-Ney over integer ids: the baseline of the demo checkpoint.

Source: Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling (1998),
section 3: three discounts per order, estimated from the counts of counts; lower orders count
distinct left neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Ids = Sequence[int] | NDArray[np.int64]
Keys = NDArray[np.int64]  # an n-gram as one number: its ids in base `vocabulary size`


class _Order:
    """Counts of one order: the weight of each known n-gram, and of each context's lower order."""

    def __init__(self, grams: Keys, counts: NDArray[np.int64], base: int) -> None:
        self.grams, self.counts = grams, counts  # sorted, distinct
        frequencies = [int((counts == n).sum()) for n in (1, 2, 3, 4)]
        y = frequencies[0] / max(frequencies[0] + 2 * frequencies[1], 1)
        ratios = [b / max(a, 1) for a, b in itertools.pairwise(frequencies)]
        discounts = [max(n - (n + 1) * y * ratio, 0.0) for n, ratio in enumerate(ratios, start=1)]
        self.discounts = np.array([0.0, *discounts])
        discount = self.discounts[np.minimum(counts, 3)]
        self.contexts, inverse = np.unique(grams // base, return_inverse=True)
        self.totals = np.bincount(inverse, weights=counts)
        self.backoff = np.bincount(inverse, weights=discount) / self.totals
        self.kept = (counts - discount) / self.totals[inverse]


class KneserNey:
    """An n-gram model trained on id sequences, each with nothing before its first id."""

    def __init__(self, sequences: Iterable[Ids], *, order: int, vocabulary_size: int) -> None:
        self.base = vocabulary_size + 1  # the extra id stands before a beginning
        if self.base**order >= 2**63:
            raise ValueError(f"order {order} with {vocabulary_size} ids does not fit in 64 bits")
        self.size = vocabulary_size
        grams = np.concatenate([self._grams(sequence, order) for sequence in sequences])
        distinct, counts = np.unique(grams, return_counts=True)
        self.orders = [_Order(distinct, counts, self.base)]
        for n in range(order - 1, 0, -1):
            # A shorter n-gram counts once for each different id seen before it.
            distinct, counts = np.unique(distinct % self.base**n, return_counts=True)
            self.orders.insert(0, _Order(distinct, counts, self.base))

    def _grams(self, sequence: Ids, order: int) -> Keys:
        padded = np.concatenate(
            [np.full(order - 1, self.size), np.asarray(sequence, dtype=np.int64)]
        )
        grams = np.zeros(len(sequence), dtype=np.int64)
        for offset in range(order):
            grams = grams * self.base + padded[offset : offset + len(sequence)]
        return grams

    def log_probabilities(self, sequence: Ids) -> NDArray[np.float64]:
        """Natural logarithms of the probability of each id given those before it."""
        grams = self._grams(sequence, len(self.orders))
        probability = np.full(len(sequence), 1 / self.size)
        for n, order in enumerate(self.orders, start=1):
            wanted = grams % self.base**n
            context = _find(order.contexts, wanted // self.base)
            backoff = np.where(context >= 0, order.backoff[context], 1.0)
            known = _find(order.grams, wanted)
            probability = backoff * probability + np.where(known >= 0, order.kept[known], 0.0)
        return np.log(probability)


def _find(sorted_keys: Keys, wanted: Keys) -> NDArray[np.int64]:
    """The index of each wanted key; -1 for missing keys."""
    places = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return np.where(sorted_keys[places] == wanted, places, -1)
