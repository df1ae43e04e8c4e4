"""Arguments as people type them: bytes that are not UTF-8, texts that begin with a hyphen, prompts
that the vocabulary does not know."""

from __future__ import annotations

import pytest

from gpt2ml_torch.__main__ import main
from tests.helpers.tiny import tiny_model, tiny_tokenizer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("typed") / "tiny.safetensors"
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(path, tokenizer=tokenizer)
    return str(path)


@pytest.mark.parametrize("prompt", ["-今", "--今天", "-5度"])
@pytest.mark.parametrize("command", ["generate", "score"])
def test_a_text_that_begins_with_a_hyphen_is_told_of_the_two_hyphens(
    command: str, prompt: str, model_file: str, capsys: Capture
) -> None:
    assert main([command, model_file, prompt]) == 2
    err = capsys.readouterr().err
    assert "behind --" in err
    assert err.count("\n") == 1
    options = ["--no-compile", "--max-new-tokens", "2"] if command == "generate" else []
    assert main([command, model_file, *options, "--", prompt]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "missing", "今\udcff"],
        ["generate", "missing", "今", "--stop", "\udce4\udcbb"],
        ["generate", "missing", "今", "--ban", "\udcff"],
        ["generate", "missing", "今", "双\udcbd", "--stop", "。"],
        ["score", "missing", "\udcff"],
        ["score", "missing", "今", "\udcd6\udcd0"],
    ],
)
def test_bytes_that_are_no_utf8_are_told_before_a_file_is_opened(
    arguments: list[str], capsys: Capture
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "isn't UTF-8" in err
    assert "missing" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("prompt", ["龘龘", "ΩΩ", "🙂"])
def test_a_prompt_that_is_all_unknown_gets_a_warning(
    prompt: str, model_file: str, capsys: Capture
) -> None:
    words = ["generate", model_file, prompt, "--no-compile", "--max-new-tokens", "2"]
    assert main(words) == 0
    assert "[UNK]" in capsys.readouterr().err
    assert main([*words[:2], "今天", *words[3:]]) == 0
    assert "[UNK]" not in capsys.readouterr().err
