"""The progress bar of `gpt2ml finetune`, fed by the events of the training loop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class TrainingBar:
    """One bar for the steps; what else happens is a line above it."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._what = ""

    def __call__(self, event: Any) -> None:
        handler: Callable[[Any], None] | None = getattr(self, f"_on_{event.kind}", None)
        if handler is not None and not self._quiet:
            handler(event)

    def tokenizing(self, what: str, done: int, total: int) -> None:
        """Show how far reading the data is, where it takes longer than a moment."""
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
        """Say what the data are, below the bars that came before."""
        self.close()
        print(summary, file=sys.stderr)

    def _on_start(self, event: Any) -> None:
        self.close()
        self._bar = _tqdm(
            total=event.values["total_steps"], initial=event.step, desc="training", unit="step"
        )

    def _on_step(self, event: Any) -> None:
        values = event.values
        self._bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {values['tokens_per_second']:.0f} tokens/s, "
            f"{values['memory_gib']:.2f} GiB"
        )
        self._bar.update(event.step - self._bar.n)

    def _on_eval(self, event: Any) -> None:
        values = event.values
        bits = values.get("bits_per_character")
        self._write(
            f"step {event.step}: validation loss {values['loss']:.4f}, perplexity "
            f"{values['perplexity']:.2f}" + (f", {bits:.3f} bits a character" if bits else "")
        )

    def _on_skip(self, event: Any) -> None:
        self._write(f"step {event.step + 1}: {event.values['reason']}")

    def _on_sample(self, event: Any) -> None:
        self._write(f"step {event.step}: {event.values['prompt']}{event.values['text']}")

    def _write(self, line: str) -> None:
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar, self._what = None, ""


def _tqdm(**options: Any) -> Any:
    from tqdm import tqdm

    return tqdm(file=sys.stderr, mininterval=0.5, dynamic_ncols=True, **options)
