"""What ended in a traceback, or took time and memory without bound, by example and variation.

Streams are in tests/commands/test_program.py, devices in tests/test_devices.py, sizes beyond reason
of fine-tuning in tests/commands/test_finetune_options.py, the kernels' library in
tests/kernels/test_build.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2ml_torch.__main__ import main
from tests.helpers.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("register") / "tiny.safetensors"
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(path, tokenizer=tokenizer)
    return str(path)


@pytest.mark.parametrize(
    "options",
    [
        ["--repetition-penalty", "1e308"],
        ["--repetition-penalty", "1e39"],
        ["--temperature", "inf"],
        ["--threads", "100000"],
        ["--batch-size", "1000000000"],
        ["-n", "1000000000"],
        ["--top-k", "99999999999999999999"],
        ["--max-new-tokens", "99999999999999999999"],
    ],
    ids=" ".join,
)
def test_a_size_beyond_reason_is_one_line(
    options: list[str], model_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", model_file, "今天", "--quiet", "--no-compile", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "expected" in err


@pytest.mark.parametrize("command", ["generate", "score"])
@pytest.mark.parametrize("file", [".", "/dev/zero", "/dev/null", "missing"])
def test_what_is_no_file_of_texts_is_one_line(
    command: str,
    file: str,
    model_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, model_file, "--file", file]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gpt2ml: error: ")
    assert file in err
    assert err.count("\n") == 1
