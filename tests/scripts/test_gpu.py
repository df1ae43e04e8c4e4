"""`scripts/gpu` runs from a plain checkout, here on the CPU and with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_every_precision_and_writes_table_and_json(tmp_path: Path) -> None:
    out = tmp_path / "gpu"
    words = ["--device", "cpu", "--size", "tiny", "--no-compile", "--out", str(out)]
    done = subprocess.run(
        [str(ROOT / "scripts" / "gpu"), *words],
        env={**os.environ, "GPT2ML_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert not [row for row in rows if "error" in row]
    for precision in ("bfloat16", "float16", "float32"):
        measured = {row["what"] for row in rows if row.get("precision") == precision}
        assert {"prefill 128, tokens/s", "decode at batch 1, tokens/s"} <= measured
    assert "decode at batch 32" in out.with_suffix(".md").read_text()
