"""`scripts/gpu` runs from a plain checkout, here on the CPU and with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from scripts.benchmarks import gpu

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
    ours = ("bfloat16", "float16", "float32", "int8", "int4")
    assert not [row for row in rows if "error" in row and row["precision"] in ours]
    assert [row for row in rows if row.get("precision") == "transformers, eager"]
    for setting in ("bfloat16", "float32"):
        tuned = {row["what"] for row in rows if row.get("precision") == f"fine-tuning, {setting}"}
        assert tuned == {"tokens/s", "predicted memory, GiB"}
    for precision in ours:
        measured = {row["what"] for row in rows if row.get("precision") == precision}
        assert {"prefill 128, tokens/s", "decode at batch 1, tokens/s"} <= measured
    assert "decode at batch 32" in out.with_suffix(".md").read_text()


def test_it_says_what_it_had_no_time_for(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--size", "tiny", "--no-compile", "--seconds", "0"]
    assert gpu.main([*options, "--out", str(tmp_path / "gpu")]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    skipped = [row["precision"] for row in rows if row["what"] == "skipped"]
    assert skipped[:6] == ["bfloat16", "float16", "float32", "int8", "int4", "transformers, eager"]
    assert skipped[6:] == [f"fine-tuning, {each}" for each in ("bfloat16", "float32", "lora")]
