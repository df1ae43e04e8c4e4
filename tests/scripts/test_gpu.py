"""`scripts/gpu` runs from a plain checkout, here on the CPU and with a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scripts.benchmarks import gpu, gpu_report

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
        assert "host time between steps, ms" in measured
    assert "decode at batch 32" in out.with_suffix(".md").read_text()
    assert json.loads(out.with_suffix(".json").read_text())["state"] == "complete"


def test_it_says_what_it_had_no_time_for(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--size", "tiny", "--no-compile", "--seconds", "0"]
    assert gpu.main([*options, "--out", str(tmp_path / "gpu")]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    skipped = [row["precision"] for row in rows if row["what"] == "skipped"]
    assert skipped[:4] == ["bfloat16", "int8", "int4", "transformers, eager"]
    assert skipped[4:7] == [f"fine-tuning, {each}" for each in ("bfloat16", "float32", "lora")]
    assert skipped[7:] == ["float16", "float32"]


def test_a_terminated_run_leaves_a_table_json_and_no_traceback(tmp_path: Path) -> None:
    out = tmp_path / "gpu"
    command = [sys.executable, "-m", "scripts.benchmarks.gpu", "--device", "cpu", "--no-compile"]
    running = subprocess.Popen(
        [*command, "--size", "base", "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not out.with_suffix(".json").exists():
            assert running.poll() is None
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        table, errors = running.communicate()
    finally:
        running.kill()
    assert running.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert "cut off: SIGTERM" in table
    assert table.strip() == out.with_suffix(".md").read_text().strip()
    assert json.loads(out.with_suffix(".json").read_text())["state"] == "cut off: SIGTERM"


def test_what_fails_is_a_row_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> float:
        raise RuntimeError("no bandwidth\nhere")

    def measured(*_: object, **__: object) -> Iterator[gpu.Row]:
        yield {"what": "measured", "value": 1.0}

    monkeypatch.setattr(gpu, "read_bandwidth", fails)
    monkeypatch.setattr(gpu, "_of_precision", measured)
    monkeypatch.setattr(gpu, "_of_finetuning", measured)
    monkeypatch.setitem(sys.modules, "transformers", None)
    options = ["--device", "cpu", "--size", "tiny", "--no-compile"]
    assert gpu.main([*options, "--out", str(tmp_path / "gpu")]) == 0
    first, *rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert first == {"what": "failed", "error": "RuntimeError: no bandwidth"}
    (failed,) = (row for row in rows if row["what"] != "measured")
    assert failed["precision"] == "transformers, eager"
    assert "transformers" in failed["error"]


@pytest.mark.parametrize("with_matplotlib", [True, False])
def test_the_plot_needs_no_matplotlib(
    with_matplotlib: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if with_matplotlib:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = gpu_report.Report(tmp_path / "gpu", "cpu", "tiny")
    report.write()
    report.add({"precision": "int8 <", "what": "decode at batch 1, tokens/s", "value": 12.5})
    report.write()
    if with_matplotlib:
        assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    else:
        root = ElementTree.parse(tmp_path / "gpu.svg").getroot()
        assert [text.text for text in root if text.tag.endswith("text")] == [
            "int8 <, decode at batch 1",
            "12.5 tokens/s",
        ]


@pytest.mark.parametrize("name", ["meta", "nonsense", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu.main(["--device", name])
    assert caught.value.code == 2
    assert f"device is '{name}'" in capsys.readouterr().err
