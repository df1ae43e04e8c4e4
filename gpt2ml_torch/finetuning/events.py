"""The events that a run reports to its callbacks: one dataclass for each kind.

Losses are in nats a token. Each line of metrics.jsonl is the `to_row` of an event.
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
        """The event as JSON types; NaN and infinity become None."""
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
    """The run is about to take its first step."""

    kind = "start"

    total_steps: int
    fresh_optimizer: bool  # its state starts from zero
    steps_per_epoch: int
    parameters: int
    trainable: int
    weights_here: int  # number of weights that this process holds
    slots_here: int  # number of values of optimizer state that this process holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTaken(Event):
    """An optimizer step was taken."""

    kind = "step"

    loss: float
    learning_rate: float
    gradient_norm: float | None
    tokens: int  # learned since the run began
    seconds: float
    tokens_per_second: float  # of tokens read, without padding
    memory_gib: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSkipped(Event):
    """A step was rejected, and nothing was learned from it."""

    kind = "skip"

    loss: float
    reason: str
    at: int  # steps before the rejected one, the same as `step`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """The validation rows were evaluated; `best` is true if no earlier loss was as low."""

    kind = "eval"

    best: bool
    loss: float
    perplexity: float
    bits_per_character: float | None = None

    def to_row(self) -> dict[str, Any]:
        """The event as JSON types, without `bits_per_character` if it is None."""
        row = super().to_row()
        if self.bits_per_character is None:
            del row["bits_per_character"]
        return row


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptContinued(Event):
    """The model in its present state continued a prompt."""

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
    """The run has ended; `reason` is the same as in `TrainResult`."""

    kind = "end"

    reason: str
    best_step: int | None
    best_loss: float | None


Callback = Callable[[Event], None]


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
