"""How much of a prompt is read between two steps, so that running texts hardly pause."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

ALONE = 256  # tokens read at once while nothing else runs, so that a cancellation need not wait
SMALLEST = 4  # tokens read at once beside others; larger parts are multiples of GRAIN
GRAIN = 2
# Of a step's time that may pass before it. A text's next token then takes 1.75 usual steps, or with
# what else a machine does, hardly ever 2.5.
SHARE = 0.75
_NEW = 0.3  # weight of the newest measurement
_RISE = 1.25  # times its usual time that a step counts as at most


class CostCurve:
    """Seconds that a call takes by its size, from calls that were measured.

    Between two measured sizes the cost lies below the straight line, because a call has a floor,
    the reading of the weights, from which it rises; the same makes the estimates beyond the
    smallest and the largest measured size too high rather than too low. Nor does a call take longer
    than several smaller ones in its place: so a size that was slow once, when something held it up,
    is tried again.
    """

    def __init__(self) -> None:
        self._points: dict[int, tuple[float, float]] = {}  # by power of two: a size, its seconds

    def note(self, size: int, seconds: float) -> None:
        """Take a measurement into account."""
        old_size, old_seconds = self._points.get(size.bit_length(), (size, seconds))
        self._points[size.bit_length()] = _follow(old_size, size), _follow(old_seconds, seconds)

    def seconds(self, size: int) -> float | None:
        """What a call of this size takes, or None before anything was measured."""
        points = sorted(self._points.values())
        line = self._on_the_line(points, size)
        parts = (cost * math.ceil(size / part) for part, cost in points if part <= size)
        return None if line is None else min([line, *parts])

    @staticmethod
    def _on_the_line(points: Sequence[tuple[float, float]], size: int) -> float | None:
        if not points:
            return None
        if size <= points[0][0]:
            return points[0][1]
        for (left, low), (right, high) in itertools.pairwise(points):
            if size <= right:
                return low + (high - low) * (size - left) / (right - left)
        return points[-1][1] * size / points[-1][0]


class Pace:
    """Follows what steps and prompts cost on this machine; says how many tokens to read."""

    def __init__(self, limit: int) -> None:
        """`limit`: tokens that the model sees."""
        self._most = min(ALONE, limit)
        self._steps, self._reads = CostCurve(), CostCurve()

    def tokens(self, *, running: int, spent: float) -> int:
        """Tokens to read now, where `running` texts wait and `spent` seconds of this pause are
        over; 0 where it is time for a step.
        """
        if not running:
            return self._most
        step = self._steps.seconds(running)
        budget = None if step is None else SHARE * step - spent
        fitting = 0 if budget is None else self._fitting(budget)
        return fitting if spent else max(fitting, SMALLEST)

    def _fitting(self, seconds: float) -> int:
        sizes = range(self._most, SMALLEST - 1, -GRAIN)
        costs = ((size, self._reads.seconds(size)) for size in sizes)
        return next((size for size, cost in costs if cost is not None and cost <= seconds), 0)

    def read_seconds(self, tokens: int) -> float:
        """What it takes to read so many tokens while nothing runs; 0 if nothing is known."""
        parts, rest = divmod(tokens, self._most)
        whole = (self._reads.seconds(self._most) or 0.0) * parts
        return whole + ((self._reads.seconds(rest) or 0.0) if rest else 0.0)

    def note_read(self, tokens: int, seconds: float) -> None:
        self._reads.note(tokens, seconds)

    def note_step(self, running: int, seconds: float) -> None:
        # One step that something else on the machine held up must not make the next pause long.
        usual = self._steps.seconds(running)
        self._steps.note(running, seconds if usual is None else min(seconds, _RISE * usual))


def _follow(old: float, new: float) -> float:
    return (1 - _NEW) * old + _NEW * new
