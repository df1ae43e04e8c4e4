"""Shared by the programs of `scripts/bench`: the parser, the log and the output files."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def make_parser(what: str, description: str | None, *, out: str) -> argparse.ArgumentParser:
    """The parser of `scripts/bench WHAT`, whose results go to benchmarks/OUT by default."""
    parser = argparse.ArgumentParser(
        prog=f"scripts/bench {what}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / out)
    return parser


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line and log to standard error."""
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    return options


def finish(out: Path, result: dict[str, Any], table: str) -> None:
    """Write OUT.json and OUT.md, and print the table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    out.with_suffix(".json").write_text(text, encoding="utf-8")
    out.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
