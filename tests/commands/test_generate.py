"""The command line: what reaches stdout and stderr, and with which status it ends."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gpt2ml_torch import Generator, Tokenizer, kernels
from gpt2ml_torch.__main__ import main
from tests.helpers.tiny import tiny_model, tiny_tokenizer

QUICK = ["--no-compile", "--quiet", "--threads", "1", "--seed", "1", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cli") / "tiny.safetensors"
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(path, tokenizer=tokenizer)
    return str(path)


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gpt2ml_torch", *arguments]
    return subprocess.Popen(
        command,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        cwd=Path(__file__).parents[2],
        **options,  # type: ignore[call-overload]
    )


def test_one_text_is_printed(model_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model_file, "今天", *QUICK]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("今天")
    assert out.endswith("\n")
    assert err == ""


def test_several_texts_are_those_of_json(
    model_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", model_file, "今天", "双十一", "-n", "2", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["generate", model_file, "今天", "双十一", "-n", "2", "--json", *QUICK]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["prompt"] + o["text"] for o in objects] == lines
    assert [o["prompt"] for o in objects] == ["今天", "今天", "双十一", "双十一"]
    assert {o["finish_reason"] for o in objects} == {"length"}


def test_stop_minimum_and_no_prompt(model_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--stop", "。", "--min-new-tokens", "5", "--no-prompt", "--top-k", "5"]
    assert main(["generate", model_file, "今天", *QUICK, *arguments]) == 0
    out = capsys.readouterr().out
    assert not out.startswith("今天")


def test_prompts_from_stdin_and_file(
    model_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("春眠\n"))
    assert main(["generate", model_file, "-", *QUICK]) == 0
    from_stdin = capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("\ufeff春眠\r\n\n双\n", encoding="utf-8")
    assert main(["generate", model_file, "--file", str(tmp_path / "prompts.txt"), *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == from_stdin.rstrip("\n")
    assert lines[1].startswith("双")


def test_without_a_prompt_each_line_is_one(
    model_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("今天\n\n双\n"))
    assert main(["generate", model_file, *QUICK]) == 0
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["今", "双"]


def test_a_line_that_cannot_be_continued_does_not_end_the_session(
    model_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("今天\n\u200b\n\ufeff \n双\n"))
    assert main(["generate", model_file, *QUICK]) == 0
    out, err = capsys.readouterr()
    assert [line[0] for line in out.splitlines()] == ["今", "双"]
    assert err.count("holds no token") == err.count("\n") == 2


def test_a_prompt_that_the_vocabulary_has_nothing_of_is_warned_of(
    model_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", model_file, "☃☂", "今☃", *QUICK]) == 0
    assert capsys.readouterr().err.count("all is [UNK]") == 1


def test_a_folder_with_one_model_file_is_that_model(
    model_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "._tiny.safetensors").write_bytes(b"of a Mac")
    (tmp_path / "models" / "adapter_model.safetensors").write_bytes(b"of peft")
    assert main(["info", "~/models"]) == 2
    assert "a folder without a model file" in capsys.readouterr().err
    shutil.copy(model_file, tmp_path / "models")
    for name in (str(tmp_path / "models"), "~/models", "~/models/tiny.safetensors"):
        assert main(["info", name]) == 0
    shutil.copy(model_file, tmp_path / "models" / "copy.safetensors")
    assert main(["info", "~/models"]) == 2
    assert "2 model files (copy.safetensors, tiny.safetensors)" in capsys.readouterr().err


def test_control_characters_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = Tokenizer(["[PAD]", "[UNK]", "今", "\x1b[31m", "\x9b2J", "\x07"])
    path = tmp_path / "hostile.safetensors"
    model = tiny_model(hostile)
    model.save_pretrained(path, tokenizer=hostile)
    assert main(["generate", str(path), "今", *QUICK[:-1], "50", "-n", "4"]) == 0
    assert main(["info", str(path) + "\x1b]0;title\x07\x9b"]) == 2
    out, err = capsys.readouterr()
    assert not set(map(chr, [*range(10), *range(11, 32), *range(127, 160)])) & set(out + err)


def test_stats(model_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model_file, "今天", "--stats", *QUICK]) == 0
    err = capsys.readouterr().err
    assert "tokens/s" in err
    assert "GB/s" in err
    assert "%" in err


def test_an_assistant_changes_no_text(
    model_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", model_file, "今天", "--quantize", "float32", *QUICK]) == 0
    expected = capsys.readouterr().out
    helped = ["--quantize", "float32", "--assistant", "int4", "--assistant-tokens", "2", "--stats"]
    assert main(["generate", model_file, "今天", *helped, *QUICK]) == 0
    out, err = capsys.readouterr()
    assert out == expected
    assert "tokens a step" in err
    packed = str(tmp_path / "packed.safetensors")
    assert main(["quantize", model_file, "--out", packed]) == 0
    capsys.readouterr()
    assert main(["generate", packed, "今天", "--assistant", "int4", *QUICK]) == 2
    assert "int8" in capsys.readouterr().err


def test_score_and_info(model_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", model_file, "今天天气", "--quiet", "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["tokens"] == 4
    assert score["log_likelihood"] < 0
    assert main(["info", model_file, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["layers"], info["width"], info["vocabulary"]) == (2, 32, 146)


def test_quantize_stores_what_loading_would_make(
    model_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = str(tmp_path / "packed.safetensors")
    for precision in ("int8", "int4"):
        assert main(["quantize", model_file, "--to", precision, "--out", packed, "--force"]) == 0
        capsys.readouterr()
        assert main(["generate", packed, "今天", *QUICK]) == 0
        from_file = capsys.readouterr().out
        assert main(["generate", model_file, "今天", "--quantize", precision, *QUICK]) == 0
        assert capsys.readouterr().out == from_file
    before = Path(packed).read_bytes()
    assert main(["quantize", model_file, "--out", packed]) == 2  # it exists
    assert main(["quantize", packed, "--out", packed + "2"]) == 2  # it is quantised already
    assert Path(packed).read_bytes() == before
    assert not Path(packed + "2").exists()


def test_the_precision_is_chosen_by_the_device_unless_asked_for(model_file: str) -> None:
    fast = kernels.load_kernels()
    for asked, quantization, dtype in (
        ({}, "int8" if fast else None, torch.bfloat16 if fast else torch.float32),
        ({"dtype": torch.float32}, "float32" if fast else None, torch.float32),
        ({"dtype": torch.float16}, "float16" if fast else None, torch.float16),
        ({"quantize": "int4"}, "int4", torch.bfloat16),
        ({"quantize": "float32"}, "float32", torch.float32),
        ({"quantize": "int8", "dtype": torch.float32}, "int8", torch.float32),
        ({"quantize": None}, None, torch.float32),
    ):
        model = Generator.from_pretrained(model_file, compile=False, **asked).model
        assert (model.quantization, model.dtype) == (quantization, dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["今", "--top-p", "2"], "--top-p is 2.0"),
        (["今", "--min-new-tokens", "999"], "more than --max-new-tokens"),
        ([""], "holds no token"),
        (["今", "--device", "tpu9"], "--device is 'tpu9'"),
        (["今", "--device", "cuda:99"], "PyTorch sees"),
        (["今", "--threads", "0"], "--threads is 0"),
        (["--file", "no-such-file"], "no-such-file"),
        (["今", "--ban-id", "100000"], "out of range"),
        (["今", "--vocab", "no-vocab.txt"], "no-vocab.txt"),
        (["今", "--top-k", "many"], "not a whole number"),
        (["今\udcff"], "PROMPT is '\\u4eca\\udcff', which isn't UTF-8"),
        (["今", "--stop", "\udcff"], "--stop is '\\udcff', which isn't UTF-8"),
        (["今", "--ban", "\udcff"], "--ban is '\\udcff', which isn't UTF-8"),
        (["-今"], "text that begins with - goes behind --"),
        (["今", "--threads", "100000"], "--threads is 100000; expected a whole number from 1 to"),
        (["今", "--device", "mps"], "--device is 'mps', which PyTorch can't use here"),
        (["今", "--no-such-flag"], "unknown option --no-such-flag"),
    ],
)
def test_errors_are_one_line(
    model_file: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["generate", model_file, "--no-compile", "--quiet", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("gpt2ml: error: ")
    assert err.count("\n") == 1


def test_a_missing_or_foreign_model_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"not a model")
    for path in (tmp_path / "missing.safetensors", foreign, tmp_path):
        assert main(["generate", str(path), "今", "--quiet"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_help_does_not_wait_for_pytorch() -> None:
    code = (
        "import sys; from gpt2ml_torch.__main__ import main\n"
        "assert main(['--help']) == 0 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_ctrl_c_ends_without_a_traceback(model_file: str) -> None:
    process = start("generate", model_file, "今天", *QUICK[:-1], "1000000")
    assert process.stdout is not None
    assert process.stdout.read(4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_broken_pipe_is_silent(model_file: str) -> None:
    process = start("generate", model_file, "今天", *QUICK[:-1], "1000000")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(4)
    process.stdout.close()
    began = time.monotonic()
    err = process.stderr.read()
    process.wait(timeout=60)
    assert err == ""
    assert time.monotonic() - began < 60
