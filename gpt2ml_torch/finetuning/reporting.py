"""Record a run's events: metrics.jsonl, loss.png and TensorBoard files."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from gpt2ml_torch.finetuning.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    PromptContinued,
    StepTaken,
)
from gpt2ml_torch.finetuning.optional import require


class MetricsFile:
    """A callback that appends events to a JSON Lines file, flushed line by line.

    With `resume_after`, events after that many steps, which a killed run wrote after its last
    checkpoint, are dropped, so that the file reads as if the run had never stopped. Raises
    `OSError` if the file can't be written.
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
        if not isinstance(event, CheckpointSaved):
            line = json.dumps(event.to_row(), ensure_ascii=False, allow_nan=False)
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError as error:
                problem = f"can't write {self._file.name}: {error.strerror}"
                raise OSError(error.errno or errno.EIO, problem) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the events of a metrics file; an incomplete last line is ignored."""
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
    """A callback that writes the events for TensorBoard (installed by the extra `finetune`)."""

    def __init__(self, folder: Path) -> None:
        # TensorBoard's own switch: it writes files without loading an installed TensorFlow, which
        # takes seconds and memory, and prints.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        require("tensorboard", "drawing curves for TensorBoard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def __call__(self, event: Event) -> None:
        if isinstance(event, (StepTaken, Evaluated)):
            prefix = "train" if isinstance(event, StepTaken) else "valid"
            for name, value in vars(event).items():
                if name not in ("step", "best") and value is not None:
                    self._writer.add_scalar(f"{prefix}/{name}", value, event.step)
        elif isinstance(event, PromptContinued):
            self._writer.add_text(event.prompt, event.text, event.step)

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()


def draw_losses(metrics: Path, picture: Path) -> bool:
    """Plot the training and validation losses in a metrics file over the steps.

    Returns False, and draws nothing, if matplotlib (the extra `finetune`) is not installed or the
    file has no step.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = read_metrics(metrics)
    rows = [row for row in rows if math.isfinite(row.get("loss") or math.nan)]
    steps = [row for row in rows if row["kind"] == "step"]
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
    """Running mean over a window that grows with the run."""
    keep = 1 - 1 / max(1, min(50, len(values) // 10))
    smoothed, mean = [], values[0]
    for value in values:
        mean = keep * mean + (1 - keep) * value
        smoothed.append(mean)
    return smoothed
