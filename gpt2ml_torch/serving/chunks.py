"""How much of a prompt is read between two steps, so that running texts hardly pause."""

from __future__ import annotations

from gpt2ml_torch.generation.engine import Engine

ALONE = 256  # tokens read at once while nothing else runs, so that a cancellation need not wait
SMALLEST = 8
SHARE = 1.0  # of a step's time that a chunk may take: a step comes after twice its usual time
_NEW = 0.3  # weight of the newest measurement


class ChunkSize:
    """Follows what a step and a token of a prompt cost on this machine."""

    def __init__(self, engine: Engine) -> None:
        self._limit = engine.limit
        self._step_seconds: float | None = None
        self._token_seconds: float | None = None

    def size(self, *, beside: bool) -> int:
        """Tokens to read at once; `beside`: while texts run."""
        if not beside:
            return min(ALONE, self._limit)
        if self._step_seconds is None or self._token_seconds is None:
            return SMALLEST
        fitting = int(SHARE * self._step_seconds / self._token_seconds)
        return max(SMALLEST, min(fitting, ALONE, self._limit))

    def note_read(self, tokens: int, seconds: float) -> None:
        # A token costs more in a short chunk; the sizes that matter are measured again and again.
        if tokens >= SMALLEST:
            self._token_seconds = _follow(self._token_seconds, seconds / tokens)

    def note_step(self, seconds: float) -> None:
        self._step_seconds = _follow(self._step_seconds, seconds)


def _follow(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEW) * old + _NEW * new
