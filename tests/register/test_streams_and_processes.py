"""Streams, processes side by side, and terminals, by example and variation."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2ml_torch.kernels import build
from gpt2ml_torch.tokenizer import Tokenizer
from tests.helpers import checkpoint_factory as factory
from tests.helpers.finetuning_runs import run as finetune
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.kernels.test_build import links
from tests.register.conftest import Run

ROOT = Path(__file__).parents[2]
CLOSED = "can't write to standard output: Bad file descriptor\n"
FULL = "can't write to standard output: No space left on device\n"
# After the command: what is done to its streams, its status, the end of its error.
STREAMS = [
    (">&-", 1, CLOSED),
    (">/dev/full", 1, FULL),
    ("2>&-", 0, ""),
    ("<&-", 0, ""),
    ("2>/dev/full", 0, ""),
    (">&- 2>&-", 1, ""),
    ("| true", 141, ""),
]
GPT2ML = f"{shlex.quote(sys.executable)} -m gpt2ml_torch"
CONVERT = f"{shlex.quote(sys.executable)} -m convert"


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=100,
    )


@pytest.mark.parametrize(("streams", "status", "error"), STREAMS)
def test_both_programs_treat_their_streams_as_unix_commands_do(
    streams: str, status: int, error: str, model_file: Path, tmp_path: Path, run: Run
) -> None:
    torch.save(factory.community_state_dict(factory.tf_weights()), tmp_path / "pytorch_model.bin")
    factory.write_beside(tmp_path)
    for command in (
        f"{GPT2ML} --help",
        f"{GPT2ML} info {model_file} --json",
        f"{CONVERT} . out.safetensors",
    ):
        ended = shell(f"{command} {streams}", tmp_path)
        assert ended.returncode == status or (streams[0] == "|" and ended.returncode == 0), command
        assert ended.stderr.decode().endswith(error)
        assert ended.stderr.count(b"\n") == error.count("\n")
    assert run("info", tmp_path / "out.safetensors", "--verify").status == 0


@pytest.mark.parametrize(
    ("streams", "status", "error"), [(">/dev/full", 1, FULL), ("2>&-", 0, ""), ("| true", 141, "")]
)
def test_generated_text_meets_bad_streams_likewise(
    streams: str, status: int, error: str, model_file: Path, tmp_path: Path
) -> None:
    words = "generate {} 今天 --max-new-tokens 3 --quiet --no-compile --quantize none {}"
    ended = shell(f"{GPT2ML} {words.format(model_file, streams)}", tmp_path)
    assert (ended.returncode, ended.stderr.decode()[-len(error) :]) == (status, error)
    assert ended.stderr.count(b"\n") == error.count("\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_escaped_not_lost(
    encoding: str, tmp_path: Path, run: Run
) -> None:
    path = tmp_path / "春.safetensors"
    tiny_model(tiny_tokenizer()).save_pretrained(path, source={"name": "眠"})
    for words in (f"info {path}", f"info {path} --json"):
        ended = shell(f"{GPT2ML} {words}", tmp_path, PYTHONIOENCODING=encoding)
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert b"\\u7720" in ended.stdout
    ended = shell(f"{GPT2ML} info 没有", tmp_path, PYTHONIOENCODING=encoding)
    assert (ended.returncode, ended.stderr.count(b"\n")) == (2, 1)
    assert b"\\u6ca1" in ended.stderr


# The kernels' library in the cache.


def cut(library: Path) -> None:
    os.truncate(library, library.stat().st_size // 2)


def shorten(library: Path) -> None:
    os.truncate(library, library.stat().st_size - 1)


def lengthen(library: Path) -> None:
    library.write_bytes(library.read_bytes() + b"\0")


def blank(library: Path) -> None:
    library.write_bytes(bytes(library.stat().st_size))


def lead_nowhere(library: Path) -> None:
    library.unlink()
    library.symlink_to("nowhere")


@pytest.mark.parametrize("damage", [cut, shorten, lengthen, blank, lead_nowhere, os.unlink])
def test_a_bad_library_is_built_again_whole(damage: object, compiler: Path) -> None:
    library = build.build()
    whole = library.read_bytes()
    damage(library)  # type: ignore[operator]
    assert build.build() == library
    assert library.read_bytes() == whole
    assert build.build() == library
    assert links(compiler) == 2


def test_what_several_killed_builds_left_is_removed(compiler: Path, tmp_path: Path) -> None:
    for name in ("build-1", "build-zz"):
        (tmp_path / "cache" / name / "deep").mkdir(parents=True)
    build.build()
    assert not list((tmp_path / "cache").glob("build-*"))


@pytest.mark.parametrize("message", [b"\xb4\xed\xce\xf3", b"\xff\xfe\x00", b"\x80" * 9000])
def test_a_compiler_may_fail_in_any_encoding(message: bytes, compiler: Path) -> None:
    (compiler.parent / "message").write_bytes(message)
    compiler.write_text(f"#!/bin/bash\ncat {compiler.parent}/message >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="failed") as caught:
        build.build()
    assert len(str(caught.value)) < 1000


# Two runs to one place.

HOLDER = """
import sys, time
from pathlib import Path
from gpt2ml_torch import disk
held = disk.lock(Path(sys.argv[1]), "busy")
print("held", flush=True)
time.sleep(100)
"""


def test_a_run_whose_folder_another_process_uses_is_told_until_that_one_is_killed(
    tuning_files: Path, tmp_path: Path, run: Run
) -> None:
    (folder := tmp_path / "out.run").mkdir()
    (tmp_path / "link").symlink_to(folder)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder / ".lock"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        words = ["finetune", tuning_files / "model.safetensors", tuning_files / "text.txt"]
        words += ["--steps", "1", "--valid-share", "0", "--cache", tuning_files / "cache"]
        for out, more in (
            ("out.safetensors", []),
            ("out.safetensors", ["--resume"]),
            ("out.safetensors", ["--force"]),
            ("other.safetensors", ["--folder", tmp_path / "link"]),
        ):
            ran = run(*words, "--out", tmp_path / out, *more)
            assert ran.is_one_line
            assert "another process is training in" in ran.err
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert run(*words, "--out", tmp_path / "out.safetensors").status == 0
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize(
    ("first", "changed", "named"),
    [
        ({"text_field": "a"}, {"text_field": "b"}, "text_field"),
        ({"prompt_field": "a"}, {"prompt_field": "c"}, "prompt_field"),
        ({"completion_field": "b"}, {"completion_field": "c"}, "completion_field"),
    ],
    ids=["text", "prompt", "completion"],
)
def test_a_resumed_run_may_not_read_other_fields(
    first: dict[str, str],
    changed: dict[str, str],
    named: str,
    tuning_files: Path,
    tmp_path: Path,
) -> None:
    data = tmp_path / "data.jsonl"
    record = {"a": "春眠不觉", "b": "夜来风雨", "c": "处闻啼鸟"}
    data.write_text((json.dumps(record) + "\n") * 20, encoding="utf-8")
    more: dict[str, Any] = {"data": (str(data),), "valid_share": 0, "eval_every": 2, "steps": 4}
    if named != "text_field":
        more |= {"prompt_field": "a", "completion_field": "b"}
    out = tmp_path / "out.safetensors"
    finetune(tuning_files, out, stop_after=3, **more | first)
    with pytest.raises(ValueError, match=named):
        finetune(tuning_files, out, resume=True, **more | changed)
    assert finetune(tuning_files, out, resume=True, **more | first).step == 4


# Lines without a token, and characters that steer a terminal.


@pytest.mark.parametrize(
    "lines",
    ["今天\n\u200b\n双\n", "\ufeff今天\r\n\x00\r\n双", "今天\n" + "\u0301" * 500 + "\n双\n"],
    ids=ascii,
)
@pytest.mark.parametrize("options", [[], ["--json"], ["--num-beams", "2"]], ids=" ".join)
def test_a_line_without_a_token_does_not_end_the_session(
    lines: str, options: list[str], model_file: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines, newline=None))
    words = ["--max-new-tokens", "2", "--quiet", "--no-compile", "--quantize", "none"]
    ran = run("generate", model_file, *words, *options)
    assert ran.status == 0
    first, second = ran.out.splitlines()
    assert "今天" in first
    assert "双" in second
    assert ran.err.count("holds no token") == ran.err.count("\n") == 1
    assert len(ran.err) < 1000


STEERING = "a\x1b[31m\x9b2J\x7f\u202eb\x07"


def is_harmless(text: str) -> bool:
    return not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in text)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file whose name, source and vocabulary would steer a terminal."""
    path = tmp_path_factory.mktemp("hostile") / f"m{STEERING}\n.safetensors"
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.vocab_text.splitlines()
    tokens[104:120] = [f"\x1b[3{n}m\x9b{n}" for n in range(16)]
    model = tiny_model(tokenizer)
    vocabulary = Tokenizer(tokens, num_embeddings=tokenizer.num_embeddings)
    model.save_pretrained(path, tokenizer=vocabulary, source={"name": f"{STEERING}\nok   forged"})
    return path


@pytest.mark.parametrize(
    "words",
    [
        ("info", "{}"),
        ("info", "{}", "--json", "--verify"),
        ("check", "{}", "--no-precisions"),
        ("generate", "{}", "今", "--no-compile", "--max-new-tokens", "8", "-n", "3"),
        ("generate", "{}", "今", "--no-compile", "--max-new-tokens", "8", "--json"),
        ("score", "{}", f"今{STEERING}"),
        ("score", "{}", f"今{STEERING}", "--json"),
        ("quantize", "{}", "--out", "{}.out", "--force"),
        ("convert", "{}", "{}.tf", "--to-tf", "--force"),
        ("info", f"missing{STEERING}\n"),
        ("generate", "{}", "今", "--device", STEERING),
        ("generate", "{}", "今", f"--{STEERING}"),
        ("merge", "{}", f"missing{STEERING}", "--out", "out"),
        (f"command{STEERING}",),
    ],
    ids=lambda words: ascii(" ".join(words)),
)
def test_no_control_character_reaches_the_terminal(
    words: tuple[str, ...], hostile: Path, run: Run
) -> None:
    ran = run(*(word.format(hostile) for word in words))
    assert is_harmless(ran.out + ran.err)
    assert not any(line.startswith(("ok   forged", ".safe")) for line in ran.out.splitlines())
    if "--json" in words:
        parsed = json.loads(ran.out)
        assert STEERING in (parsed["source"]["name"] if "source" in parsed else parsed["text"]) or (
            words[0] == "generate"
        )
