"""What a run leaves to look at: metrics.jsonl, loss.png and TensorBoard's files.

Each is fed by the loop's events.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened in a run, after so many steps.

    Kinds and their `values`: "start" (total_steps, steps_per_epoch, parameters, trainable,
    fresh_optimizer, and what this process has: weights_here, slots_here), "step" (loss,
    learning_rate, gradient_norm, tokens, seconds, tokens_per_second, memory_gib), "skip" (loss,
    reason, at), "eval" (loss, perplexity, bits_per_character, best), "sample" (prompt, text),
    "checkpoint" (path), "end" (reason, best_step, best_loss). Losses are nats a token; `tokens`
    are those learned so far.
    """

    kind: str
    step: int
    values: Mapping[str, Any]


Callback = Callable[[Event], None]

_WRITTEN = ("start", "step", "skip", "eval", "sample", "end")


class MetricsFile:
    """A callback that appends each event to a JSON Lines file, flushed line by line.

    With `resume_after` steps, what a killed run wrote beyond them is cut off, so that the file
    reads as if it had never stopped. Raises `OSError` where it can't be written.
    """

    def __init__(self, path: Path, *, resume_after: int | None = None) -> None:
        kept: list[str] = []
        if resume_after is not None and path.exists():
            kept = [json.dumps(row) for row in read_metrics(path) if row["step"] <= resume_after]
            kept = [line for line in kept if json.loads(line)["kind"] != "end"]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held until `close`)

    def __call__(self, event: Event) -> None:
        if event.kind in _WRITTEN:
            row = {"kind": event.kind, "step": event.step, **event.values}
            try:
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self._file.flush()
            except OSError as error:
                problem = f"can't write {self._file.name}: {error.strerror}"
                raise OSError(error.errno or errno.EIO, problem) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics file; a last line that was cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row:
            rows.append(row)
    return rows


class TensorBoard:
    """A callback that writes the same figures for TensorBoard (the extra `finetune`)."""

    def __init__(self, folder: Path) -> None:
        # TensorBoard's own switch: it writes files by itself, and doesn't load an installed
        # TensorFlow for that, which takes seconds and memory and prints.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                'tensorboard is not installed: pip install "gpt2ml-torch[finetune]"'
            ) from None
        self._writer = SummaryWriter(str(folder))

    def __call__(self, event: Event) -> None:
        if event.kind in ("step", "eval"):
            prefix = "train" if event.kind == "step" else "valid"
            for name, value in event.values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._writer.add_scalar(f"{prefix}/{name}", value, event.step)
        elif event.kind == "sample":
            self._writer.add_text(event.values["prompt"], event.values["text"], event.step)

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()


def draw_losses(metrics: Path, picture: Path) -> bool:
    """Plot training and validation loss over the steps of a metrics file.

    Returns False, and draws nothing, without matplotlib (the extra `finetune`) or without a step.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = read_metrics(metrics)
    steps = [
        row for row in rows if row["kind"] == "step" and math.isfinite(row.get("loss", math.nan))
    ]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    if not steps:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no global backend is touched
    axes = figure.add_subplot()
    losses = [row["loss"] for row in steps]
    axes.plot([row["step"] for row in steps], losses, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot([row["step"] for row in steps], _smooth(losses), color="tab:blue", label="training")
    if evaluations:
        places = [row["step"] for row in evaluations]
        axes.plot(
            places,
            [row["loss"] for row in evaluations],
            "o-",
            color="tab:orange",
            label="validation",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    partial = picture.with_name(picture.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, picture)
    return True


def _smooth(values: list[float]) -> list[float]:
    """Running mean, over more the longer the run is."""
    keep = 1 - 1 / max(1, min(50, len(values) // 10))
    smoothed, mean = [], values[0]
    for value in values:
        mean = keep * mean + (1 - keep) * value
        smoothed.append(mean)
    return smoothed
