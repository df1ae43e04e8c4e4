"""A watch over the loss: not a number, or far above what it has been."""

from __future__ import annotations

import math

_MEMORY = 0.98  # of the running mean and variance
_WARM = 20  # steps before a spike can be told from the ordinary
_LEAST = 1.0  # nats above the mean that are never called a spike


class LossWatch:
    """Remembers the losses' mean and spread; a spike is `factor` deviations above the mean."""

    def __init__(self, *, factor: float) -> None:
        self.factor = factor
        self._mean = 0.0
        self._variance = 0.0
        self._count = 0

    def trouble(self, loss: float) -> str | None:
        """What is wrong with this loss, in words; None if nothing."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        limit = self._mean + max(_LEAST, self.factor * math.sqrt(self._variance))
        if self._count >= _WARM and loss > limit:
            return f"the loss jumped to {loss:.3f}, from {self._mean:.3f} on average"
        return None

    def add(self, loss: float) -> None:
        """Remember a good loss."""
        self._count += 1
        keep = min(_MEMORY, 1 - 1 / self._count)
        difference = loss - self._mean
        self._mean += (1 - keep) * difference
        self._variance = keep * (self._variance + (1 - keep) * difference**2)

    def state(self) -> list[float]:
        """All it remembers, as JSON."""
        return [self._mean, self._variance, self._count]

    def restore(self, state: list[float]) -> None:
        """Set what `state` gave."""
        self._mean, self._variance = state[0], state[1]
        self._count = int(state[2])
