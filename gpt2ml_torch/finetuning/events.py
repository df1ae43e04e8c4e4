"""What a run tells its callbacks: one dataclass for each kind of event.

Losses are nats a token. A line of metrics.jsonl is an event as `to_row` gives it.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run, after `step` optimizer steps; `kind` names its class."""

    kind: ClassVar[str] = ""

    step: int

    def to_row(self) -> dict[str, Any]:
        """The event as JSON types: numbers that are not finite become None."""
        fields = {name: _json(value) for name, value in self._fields().items()}
        return {"kind": self.kind, "step": self.step, **fields}

    def _fields(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "step"}

    @property
    def values(self) -> Mapping[str, Any]:
        """The fields except `step`. Deprecated: read the fields of the event itself."""
        warnings.warn(
            "Event.values is deprecated; read the fields of the event itself",
            DeprecationWarning,
            stacklevel=2,
        )
        return self._fields()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """Before the first step; `weights_here` and `slots_here` are numbers that this process has."""

    kind = "start"

    total_steps: int
    fresh_optimizer: bool
    steps_per_epoch: int
    parameters: int
    trainable: int
    weights_here: int
    slots_here: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTaken(Event):
    """One optimizer step; `tokens` are learned so far, and the rate counts what was read."""

    kind = "step"

    loss: float
    learning_rate: float
    gradient_norm: float | None
    tokens: int
    seconds: float
    tokens_per_second: float
    memory_gib: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSkipped(Event):
    """A step from which nothing was learned, the one after `at` steps."""

    kind = "skip"

    loss: float
    reason: str
    at: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """The validation rows were read; `best` says that no evaluation before was as good."""

    kind = "eval"

    best: bool
    loss: float
    perplexity: float
    bits_per_character: float | None = None

    def to_row(self) -> dict[str, Any]:
        """As of any event, without the bits where the characters were not counted."""
        row = super().to_row()
        if self.bits_per_character is None:
            del row["bits_per_character"]
        return row


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptContinued(Event):
    """The model as it is continued a prompt."""

    kind = "sample"

    prompt: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is complete and on the disk."""

    kind = "checkpoint"

    path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """After the last step; `reason` is the one in `TrainResult`."""

    kind = "end"

    reason: str
    best_step: int | None
    best_loss: float | None


Callback = Callable[[Event], None]


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
