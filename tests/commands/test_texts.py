"""Texts from a file: bounded, from pipes too."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2ml_torch.commands import common

ROOT = Path(__file__).parents[2]


def test_lines_keep_their_own_spaces_and_lose_byte_order_mark_and_blank_ones(
    tmp_path: Path,
) -> None:
    file = tmp_path / "lines.txt"
    file.write_bytes("\ufeff 春 \r\n\r\n \n眠\u2028不\n".encode())
    assert common.read_lines(str(file)) == [" 春 ", "眠\u2028不"]


def test_what_has_no_end_no_writer_or_too_much_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe holds no text; expected one a line"):
        common.read_lines(str(tmp_path / "pipe"))
    with pytest.raises(OSError, match="not a regular file; expected texts, one a line"):
        common.read_lines("/dev/zero")
    monkeypatch.setattr(common, "_MAX_TEXT_BYTES", 5)
    (tmp_path / "long.txt").write_text("春眠\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"long\.txt has more than 5 bytes"):
        common.read_lines(str(tmp_path / "long.txt"))


@pytest.mark.parametrize("redirection", ["printf '春\\n眠\\n' | {} /dev/stdin", "{} /dev/stdin <a"])
def test_standard_input_has_a_name_too(tmp_path: Path, redirection: str) -> None:
    (tmp_path / "a").write_text("春\n眠\n", encoding="utf-8")
    program = (
        "import sys; from gpt2ml_torch.commands.common import read_lines;"
        "print(ascii(read_lines(sys.argv[1])))"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    result = subprocess.run(
        ["bash", "-c", redirection.format(command)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout == f"{['春', '眠']!a}\n", result.stderr
