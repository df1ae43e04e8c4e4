"""The results of `scripts/gpu` so far, as JSON, table and plot."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from scripts.benchmarks import machine

Row = dict[str, Any]


@dataclasses.dataclass
class Report:
    """What is known so far. `write` replaces whole files, so that a run that is cut off, even by
    SIGKILL, leaves complete ones.
    """

    out: Path
    device: str
    size: str
    state: str = "running"
    tests: Row | None = None
    rows: list[Row] = dataclasses.field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        result: dict[str, Any] = {
            "machine": machine.describe(),
            "device": self.device,
            "size": self.size,
        }
        result |= {"state": self.state, "tests": self.tests, "rows": self.rows}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        _replace(self.out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
        _replace(self.out.with_suffix(".md"), self.table())
        if importlib.util.find_spec("matplotlib"):
            self._plot()

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
        from matplotlib.figure import Figure

        bars = {
            f"{row['precision']}, {row['what'].removesuffix(', tokens/s')}": row["value"]
            for row in self.rows
            if row["what"].startswith("decode")
        }
        figure = Figure(figsize=(8, 1 + 0.3 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(list(bars), list(bars.values()))
        axes.set_xlabel("tokens/s")
        path = self.out.with_suffix(".png")
        new = path.with_suffix(".new.png")
        figure.savefig(new)
        os.replace(new, path)


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
