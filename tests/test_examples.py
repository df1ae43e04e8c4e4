"""The examples run as their docstrings say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_generate_writes_one_text_streams_one_and_samples_three(shipped_model: Path) -> None:
    lines = run("generate.py", shipped_model, "春眠不觉晓", "--max-new-tokens", 8)
    texts = [line for line in lines if not line.endswith(":")]
    assert len(texts) == 5
    assert all(text.startswith("春眠不觉晓") for text in texts)


def test_score_ranks_the_real_verse_first(shipped_model: Path) -> None:
    lines = run("score.py", shipped_model, "床前明月光，疑是地下霜。", "床前明月光，疑是地上霜。")
    assert lines[0].endswith("疑是地上霜。")
    assert lines[1].startswith("  least expected: ")


def test_finetune_changes_what_the_model_writes(shipped_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "primers.txt"
    primers = (EXAMPLES / "primers.txt").read_text(encoding="utf-8")
    assert len(primers.splitlines()) > 300
    text.write_text("\n".join(primers.splitlines()[:60]), encoding="utf-8")
    out = tmp_path / "tuned.safetensors"
    before, after = run("finetune.py", shipped_model, text, out, "--epochs", 1)
    assert before.startswith(f"{shipped_model}: 天地玄黄，")
    assert after.startswith(f"{out}: 天地玄黄，")
    assert before.partition(": ")[2] != after.partition(": ")[2]
