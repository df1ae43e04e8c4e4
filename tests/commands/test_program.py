"""How the programs treat their streams and end: as any well-made command."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2ml_torch.commands.program import describe

ROOT = Path(__file__).parents[2]

# A light stand-in for a command: the real ones differ in what they compute.
TOOL = """
import sys
from gpt2ml_torch.commands.output import write_json
from gpt2ml_torch.commands.program import run_program
from gpt2ml_torch.commands.streams import read_input

def work():
    for word in sys.argv[1:]:
        if word == "read":
            print(read_input())
        elif word == "log":
            print("log", file=sys.stderr)
        elif word == "json":
            write_json({"text": "春😀", "odd": "\\udcff", "bad": [float("nan"), float("inf")]})
        elif word == "long":
            for _ in range(100_000):
                print("春眠不觉晓")
        elif word == "file":
            with open("/dev/full", "w") as file:
                file.write("x")
        elif word == "work":
            open("done", "w").close()
        elif word == "interrupt":
            raise KeyboardInterrupt
        elif word == "memory":
            raise MemoryError
        elif word == "fault":
            raise ZeroDivisionError
        else:
            print(word)
    return 0

sys.exit(run_program("tool", work, interrupted="stopped"))
"""


def run(
    folder: Path, words: str, redirection: str = "", **environment: str
) -> tuple[int, bytes, str]:
    """Status, standard output and standard error of the tool in a shell."""
    (folder / "tool.py").write_text(TOOL, encoding="utf-8")
    command = f"{shlex.quote(sys.executable)} tool.py {words} {redirection}"
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    return result.returncode, result.stdout, result.stderr.decode()


@pytest.mark.parametrize(
    ("words", "redirection", "status", "error"),
    [
        ("work", ">&-", 0, ""),
        ("x work", ">&-", 1, "tool: error: can't write to standard output: Bad file descriptor\n"),
        ("x work", ">/dev/full", 1, "standard output: No space left on device\n"),
        ("long work", ">/dev/full", 1, "standard output: No space left on device\n"),
        ("x work", "| true", (0, 141), ""),
        ("long", "| head -1 >/dev/null", 141, ""),
        ("x log work", "2>&-", 0, ""),
        ("x log work", "2>/dev/full", 0, ""),
        ("x log work", ">&- 2>&-", 1, ""),
        ("x log work", ">/dev/full 2>&1", 1, ""),
        ("long log", "2>&1 | true", 141, ""),
        ("x work", "<&-", 0, ""),
        ("read", "<&-", 2, "tool: error: can't read standard input: Bad file descriptor\n"),
        ("x work", "<&- >&- 2>&-", 1, ""),
        ("x file", "", 2, "tool: error: No space left on device\n"),
        ("x interrupt", "", 130, "tool: stopped\n"),
        ("x memory", "", 2, "tool: error: out of memory\n"),
        ("x memory", ">/dev/full", 2, "tool: error: out of memory\n"),
    ],
)
def test_a_stream_that_fails_is_told_as_unix_commands_tell_it(
    tmp_path: Path, words: str, redirection: str, status: int | tuple[int, int], error: str
) -> None:
    found, _, errors = run(tmp_path, words, redirection)
    assert found in (status if isinstance(status, tuple) else (status,)), errors
    assert errors.endswith(error)
    assert errors.count("\n") == error.count("\n")
    if words in ("work", "x work", "x log work"):
        assert (tmp_path / "done").exists()


def test_an_unbuffered_stream_fails_likewise(tmp_path: Path) -> None:
    status, _, errors = run(tmp_path, "x", ">/dev/full", PYTHONUNBUFFERED="1")
    assert (status, errors.count("\n")) == (1, 1)
    assert run(tmp_path, "long", "| true", PYTHONUNBUFFERED="1")[::2] == (141, "")


def test_a_closed_stream_gives_its_number_to_no_file(tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text(
        "import os, sys\n"
        "from gpt2ml_torch.commands.program import run_program\n"
        "def work():\n"
        "    with open('mine', 'w') as file:\n"
        "        os.write(2, b'into the file?')\n"
        "        return file.fileno()\n"
        "sys.exit(run_program('tool', work))\n"
    )
    command = f"{shlex.quote(sys.executable)} tool.py <&- >&- 2>&-"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, timeout=60)
    assert result.returncode > 2
    assert (tmp_path / "mine").read_bytes() == b""


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path: Path) -> None:
    status, _, errors = run(tmp_path, "fault")
    assert status == 1
    assert "ZeroDivisionError" in errors


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "gbk"])
def test_text_that_the_encoding_lacks_is_escaped(tmp_path: Path, encoding: str) -> None:
    status, output, errors = run(tmp_path, "春😀 json", PYTHONIOENCODING=encoding)
    assert (status, errors) == (0, "")
    text, line = output.decode(encoding.partition(":")[0]).splitlines()
    assert text == ("春\\U0001f600" if encoding == "gbk" else "\\u6625\\U0001f600")
    assert json.loads(line) == {"text": "春😀", "odd": "\udcff", "bad": [None, None]}


def test_an_ascii_environment_still_reads_utf_8(tmp_path: Path) -> None:
    (tmp_path / "input").write_text("春眠\n", encoding="utf-8")
    status, output, errors = run(tmp_path, "read", "< input", PYTHONIOENCODING="ascii")
    assert (status, output, errors) == (0, b"\\u6625\\u7720\n", "")
    (tmp_path / "input").write_bytes(b"\xff\xfe")
    status, _, errors = run(tmp_path, "read", "< input")
    assert status == 2
    assert errors == "tool: error: standard input isn't utf-8: invalid start byte at byte 0\n"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            FileNotFoundError(2, "No such file or directory", "a\x1b[31m\nb"),
            "a\\x1b[31m b: No such",
        ),
        (OSError(28, "no room for out.safetensors"), "no room for out.safetensors"),
        (OSError(5, "Input/output error"), "while reading: Input/output error"),
        (ValueError("a\x9b2J\x7f\u202eb\udc80"), "a\\x9b2J\\x7f\\u202eb\\udc80"),
        (ValueError(""), "ValueError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: Default"),
    ],
)
def test_an_error_is_one_line_that_steers_no_terminal(error: Exception, text: str) -> None:
    described = describe(error, context="while reading")
    assert described.startswith(text)
    assert described.isprintable()
