"""The progress bar of `gpt2ml finetune`, fed by the events of the training loop."""

from __future__ import annotations

import sys
from typing import Any

from gpt2ml_torch.commands.output import printable
from gpt2ml_torch.finetuning.events import (
    Evaluated,
    Event,
    PromptContinued,
    RunStarted,
    StepSkipped,
    StepTaken,
)


class TrainingBar:
    """One bar for the steps; other events are lines above it."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._what = ""

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if self._quiet:
            return
        if isinstance(event, RunStarted):
            self.close()
            self._bar = _tqdm(
                total=event.total_steps, initial=event.step, desc="training", unit="step"
            )
        elif isinstance(event, StepTaken):
            self._bar.set_postfix_str(
                f"loss {event.loss:.3f}, {event.tokens_per_second:.0f} tokens/s, "
                f"{event.memory_gib:.2f} GiB"
            )
            self._bar.update(event.step - self._bar.n)
        elif (line := _line(event)) is not None:
            self._bar.write(printable(line), file=sys.stderr)

    def tokenizing(self, what: str, done: int, total: int) -> None:
        """Show the progress of reading the data, if it takes longer than a moment."""
        if self._quiet:
            return
        if what != self._what:
            self.close()
            self._bar = _tqdm(
                total=total, desc=what, unit="B", unit_scale=True, delay=1, leave=False
            )
            self._what = what
        self._bar.update(done - self._bar.n)

    def data(self, summary: object) -> None:
        """Print the summary of the data below earlier bars."""
        self.close()
        print(printable(str(summary)), file=sys.stderr)

    def close(self) -> None:
        """Close the bar, leaving its last state visible."""
        if self._bar is not None:
            self._bar.close()
            self._bar, self._what = None, ""


def _line(event: Event) -> str | None:
    """The line for an event above the bar, or None."""
    if isinstance(event, Evaluated):
        bits = event.bits_per_character
        return (
            f"step {event.step}: validation loss {event.loss:.4f}, perplexity "
            f"{event.perplexity:.2f}" + (f", {bits:.3f} bits a character" if bits else "")
        )
    if isinstance(event, StepSkipped):
        return f"step {event.step + 1}: {event.reason}"
    if isinstance(event, PromptContinued):
        return f"step {event.step}: {event.prompt}{event.text}"
    return None


def _tqdm(**options: Any) -> Any:
    from tqdm import tqdm

    return tqdm(file=sys.stderr, mininterval=0.5, dynamic_ncols=True, **options)
