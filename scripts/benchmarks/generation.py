"""Prefill and decode speed by precision, for this project and its peers, interleaved in one run.

    scripts/bench                      # everything, the published size
    scripts/bench --size base --groups 16-bit --repeats 2

Contestants of one precision class stay loaded side by side and take turns, so a drift of the
machine's speed affects all of them. Figures are medians, after a warm-up turn that is not counted.
Writes RESULT.json, RESULT.md and RESULT.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gpt2ml_torch.bandwidth import read_bandwidth
from scripts.benchmarks import machine, report
from scripts.benchmarks.program import ROOT
from scripts.benchmarks.weights import SIZES

logger = logging.getLogger("bench")

GROUPS: dict[str, list[tuple[str, str]]] = {
    "8-bit": [("ours", "int8"), ("llama.cpp", "int8"), ("CTranslate2", "int8")],
    "4-bit": [("ours", "int4"), ("llama.cpp", "int4")],
    "16-bit": [("ours", "bfloat16"), ("llama.cpp", "bfloat16"), ("llama.cpp", "float16")],
    "16-bit, PyTorch": [
        ("ours", "bfloat16"),
        ("ours, no kernels", "bfloat16"),
        ("ours, no kernels, eager", "bfloat16"),
        ("transformers GPT-2, eager", "bfloat16"),
        ("transformers GPT-2, compiled", "bfloat16"),
    ],
    "32-bit": [
        ("ours", "float32"),
        ("transformers GPT-2, eager", "float32"),
        ("CTranslate2", "float32"),
    ],
    "32-bit, PyTorch": [
        ("ours, no kernels", "float32"),
        ("ours, no kernels, eager", "float32"),
        ("transformers GPT-2, compiled", "float32"),
    ],
    "32-bit, as it was done": [
        ("ours", "float32"),
        ("TensorFlow, with cache", "float32"),
        ("no cache, as bert4keras", "float32"),
    ],
}
PREFILL = (128, 512, 1000)
BATCHES = (1, 8, 32)
PATIENCE = 45  # seconds; a request that takes longer in the first turn is not repeated
# Slow contestants decode only a few tokens at batch 1, or are limited to smaller batches.
SLOW = ("no cache, as bert4keras", "TensorFlow, with cache")
LARGEST = {
    "ours, no kernels": 8,
    "ours, no kernels, eager": 8,
    "transformers GPT-2, eager": 8,
    "transformers GPT-2, compiled": 8,
    "CTranslate2": 8,
}


@dataclasses.dataclass
class Contestant:
    """A process that answers requests, and its measurements so far, in seconds."""

    name: str
    precision: str
    process: subprocess.Popen[str]
    facts: dict[str, Any]
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    slow: set[str] = dataclasses.field(default_factory=set)  # requests not to be repeated

    def ask(self, what: str, *arguments: int) -> float | None:
        """The seconds of a request; None if the process died."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"what": what, "arguments": arguments}) + "\n")
            self.process.stdin.flush()
            return float(_answer(self.process)["seconds"])
        except (OSError, EOFError):
            return None  # too little memory, or a size that it does not support


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise EOFError("the contestant ended")
    return dict(json.loads(line))


def start(name: str, precision: str, options: argparse.Namespace, folder: Path) -> Contestant:
    """Start a contestant and wait until it is loaded (and compiled)."""
    logger.info("starting %s, %s", name, precision)
    command = [sys.executable, "-m", "scripts.benchmarks.contestant"]
    errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (lives as long as the contestant)
    process = subprocess.Popen(
        [*command, name, precision, options.size, options.device, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if options.verbose else errors,
        text=True,
        cwd=ROOT,
    )
    try:
        facts = _answer(process)
    except EOFError:
        errors.seek(0)
        reason = (errors.read().strip().splitlines() or [f"status {process.wait()}"])[-1]
        logger.warning("%s, %s failed to start: %s", name, precision, reason)
        facts = {"absent": "it failed to start"}
    return Contestant(name, precision, process, facts)


def requests(contestant: Contestant, options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """The requests to a contestant: (what, size, new tokens)."""
    if contestant.name in SLOW:
        return [("decode", 1, 8)]
    prefills = [("prefill", tokens, 0) for tokens in options.prefill]
    batches = [batch for batch in options.batches if batch <= LARGEST.get(contestant.name, batch)]
    return prefills + [("decode", batch, options.new_tokens) for batch in batches]


def run_group(
    group: str, options: argparse.Namespace, folder: Path, bandwidths: list[float]
) -> list[dict[str, Any]]:
    """Measure one group; a row for each contestant and request."""
    contestants = [start(*pair, options, folder) for pair in GROUPS[group]]
    present = [c for c in contestants if "absent" not in c.facts]
    for turn in range(1 + options.repeats):  # the first one warms up
        bandwidths.append(read_bandwidth(options.device))
        logger.info("turn %d: %.1f GB/s of read bandwidth", turn, bandwidths[-1] / 1e9)
        for contestant in present:
            for request in requests(contestant, options):
                _measure(contestant, request, warm_up=turn == 0)
    rows = [row for contestant in contestants for row in _rows(group, contestant)]
    for contestant in contestants:
        contestant.process.kill()
        contestant.process.wait()
    return rows


def _measure(contestant: Contestant, request: tuple[str, int, int], *, warm_up: bool) -> None:
    what, size, new_tokens = request
    key = f"{what} {size} {new_tokens}"
    if key in contestant.slow:
        return
    arguments = (size,) if what == "prefill" else (size, new_tokens)
    began = time.perf_counter()
    seconds = contestant.ask(what, *arguments)
    if seconds is None:
        contestant.slow.add(key)
        return
    log = (contestant.name, contestant.precision, what, size, seconds)
    logger.info("%s, %s: %s %d: %.2f s", *log)
    took = time.perf_counter() - began
    if warm_up and took > PATIENCE and "compiled" not in contestant.name:
        contestant.slow.add(key)  # nothing was compiled, so the first turn counts
        contestant.seconds[key] = [seconds]
    elif seconds <= 0:  # the difference of two runs, if the shorter one was disturbed
        logger.warning("%s, %s: not counted", contestant.name, contestant.precision)
    elif not warm_up:
        contestant.seconds.setdefault(key, []).append(seconds)


def _rows(group: str, contestant: Contestant) -> list[dict[str, Any]]:
    common = {"group": group, "name": contestant.name, "precision": contestant.precision}
    if "absent" in contestant.facts:
        return [{**common, "absent": contestant.facts["absent"]}]
    rows: list[dict[str, Any]] = [{**common, "what": "start", **contestant.facts}]
    for request, seconds in contestant.seconds.items():
        what, size, new_tokens = request.split()
        tokens = int(size) if what == "prefill" else int(size) * int(new_tokens)
        rates = [tokens / value for value in seconds]
        rows.append(
            {
                **common,
                "what": what,
                "size": int(size),
                "tokens_per_second": statistics.median(rates),
                "slowest": min(rates),
                "fastest": max(rates),
                "repeats": len(rates),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="mega")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, nargs="*", default=PREFILL)
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--folder", type=Path, help="keep the random weights here")
    parser.add_argument("--add", action="store_true", help="keep the other rows in RESULT")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "generation")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with tempfile.TemporaryDirectory(prefix="gpt2ml-bench-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        hardware = machine.describe()
        rows, bandwidths = _kept(options, hardware) if options.add else ([], [])
        for group in options.groups:
            rows = merged(rows, run_group(group, options, folder, bandwidths))
            # After each group, so that nothing is lost if a long run is interrupted.
            table = write(options, hardware, rows, bandwidths)
    print(table)


def _kept(
    options: argparse.Namespace, hardware: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[float]]:
    """Rows and bandwidths of an earlier run on this machine; its date is added to `hardware`."""
    result = json.loads(options.out.with_suffix(".json").read_text())
    earlier = {**result["machine"], "date": hardware["date"]}
    if (earlier, result["size"]) != (hardware, options.size):
        raise SystemExit(f"{options.out}.json is of another machine or size; leave out --add")
    began = result["machine"]["date"].split(" to ")[0]
    if began != hardware["date"]:
        hardware["date"] = f"{began} to {hardware['date']}"
    return result["rows"], result["bandwidths"]


def merged(rows: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The earlier rows, replaced by those measured again; in the order of `GROUPS`."""
    order = [(group, *contestant) for group in GROUPS for contestant in GROUPS[group]]

    def contestant(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["group"], row["name"], row["precision"]

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return *contestant(row), row.get("what"), row.get("size")

    started = {contestant(row) for row in measured if "absent" not in row}
    again = {key(row) for row in measured}
    kept = [
        row
        for row in rows
        if key(row) not in again and not ("absent" in row and contestant(row) in started)
    ]
    return sorted(kept + measured, key=lambda row: order.index(contestant(row)))


def write(
    options: argparse.Namespace,
    hardware: dict[str, Any],
    rows: list[dict[str, Any]],
    bandwidths: list[float],
) -> str:
    """Write the results so far; returns the table."""
    result = {
        "machine": hardware,
        "size": options.size,
        "new_tokens": options.new_tokens,
        "read_bandwidth": statistics.median(bandwidths),
        "bandwidths": bandwidths,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    table = report.markdown(result)
    options.out.with_suffix(".md").write_text(table)
    report.plot(result, options.out.with_suffix(".png"))
    return table


if __name__ == "__main__":
    main()
