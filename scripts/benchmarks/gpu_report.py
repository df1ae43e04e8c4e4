"""The results of `scripts/gpu` so far, as JSON, table and plot."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import time
from pathlib import Path
from typing import Any

from scripts.benchmarks import machine

Row = dict[str, Any]
PLOT_EVERY = 10  # seconds; drawing takes a part of a second


@dataclasses.dataclass
class Report:
    """The results so far.

    `write` replaces whole files, so that a run that is cut off, even by SIGKILL, leaves complete
    ones.
    """

    out: Path
    device: str
    size: str
    state: str = "running"
    tests: Row | None = None
    rows: list[Row] = dataclasses.field(default_factory=list)
    _next_plot: float = 0.0

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write(plot=time.monotonic() >= self._next_plot)

    def write(self, *, plot: bool = True) -> None:
        result: dict[str, Any] = {
            "machine": machine.describe(),
            "device": self.device,
            "size": self.size,
        }
        result |= {"state": self.state, "tests": self.tests, "rows": self.rows}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        _replace(self.out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
        _replace(self.out.with_suffix(".md"), self.table())
        if plot:
            self._plot()
            self._next_plot = time.monotonic() + PLOT_EVERY

    def table(self) -> str:
        about = machine.describe()
        tests = self.tests["tail"][-1] if self.tests else "none on this device"
        lines = [
            f"{about['date']}, GPU: {about['gpu']}, {about['processor']}; Python "
            f"{about['python']}, torch {about['torch']}; {self.size} on {self.device}, random "
            f"weights; {self.state}.",
            "",
            f"Tests: {tests}",
            "",
            "| precision | measured | value | of the bandwidth |",
            "|---|---|---:|---:|",
        ]
        for row in self.rows:
            value = f"{row['value']:.4g}" if "value" in row else row["error"].replace("|", "\\|")
            share = f"{row['share_of_bandwidth']:.0%}" if "share_of_bandwidth" in row else ""
            lines.append(f"| {row.get('precision', '')} | {row['what']} | {value} | {share} |")
        return "\n".join([*lines, ""])

    def _plot(self) -> None:
        """Draw the decode rows as PNG with matplotlib, or as SVG without it."""
        bars = {
            f"{row['precision']}, {row['what'].removesuffix(', tokens/s')}": row["value"]
            for row in self.rows
            if row["what"].startswith("decode")
        }
        try:
            _draw_png(bars, self.out.with_suffix(".png"))
        except Exception:  # not installed, or built for another NumPy
            _replace(self.out.with_suffix(".svg"), _svg(bars))


def _draw_png(bars: dict[str, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.3 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(bars), list(bars.values()))
    axes.invert_yaxis()  # in the order of the table
    axes.set_xlabel("tokens/s")
    new = path.with_suffix(".new.png")
    figure.savefig(new)
    os.replace(new, path)


def _svg(bars: dict[str, float]) -> str:
    longest = max(bars.values(), default=1.0)
    lines = [
        f'<text x="295" y="{y + 12}" text-anchor="end">{html.escape(name)}</text>'
        f'<rect x="300" y="{y}" width="{400 * value / longest:.1f}" height="14" fill="#1f77b4"/>'
        f'<text x="{305 + 400 * value / longest:.1f}" y="{y + 12}">{value:.4g} tokens/s</text>'
        for y, (name, value) in zip(range(4, 10**6, 18), bars.items(), strict=False)
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="840" height="{18 * len(bars) + 8}" '
    return "\n".join([f'{head}font-family="sans-serif" font-size="12">', *lines, "</svg>", ""])


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
