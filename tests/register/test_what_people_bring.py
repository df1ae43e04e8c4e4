"""Files as people have them, by example and variation.

Checkpoints are in tests/convert/test_inputs.py and tests/convert/test_errors.py, training files in
tests/finetuning/data/test_records.py and test_lines.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt2ml_torch.__main__ import main
from gpt2ml_torch.finetuning import tokenize_files
from tests.helpers.tiny import tiny_model, tiny_tokenizer

TEXTS = ["今天天气不错", "春眠不觉晓", "处处闻啼鸟"]


def lines(*values: object) -> str:
    return "\n".join(json.dumps(value, ensure_ascii=False) for value in values)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "\ufeff" + json.dumps(TEXTS)),
        ("b.json", json.dumps([{"text": text} for text in TEXTS], indent=2)),
        ("c.json", json.dumps([*TEXTS, "", "  "])),
        ("d.jsonl", lines(*TEXTS)),
        ("e.jsonl", "\n".join("\ufeff" + lines({"text": text}) for text in TEXTS)),
        ("f.jsonl", lines(*({"content": text} for text in [*TEXTS, ""]))),
        ("g.jsonl", lines(*({"text": text} for text in [*TEXTS, None]))),
        ("h.txt", "\n\u200b\n".join(TEXTS)),
        ("i.txt", "\r\ufeff\r".join(TEXTS)),
        ("j.txt", "\n\u00ad \u2060\n".join(TEXTS)),
        ("k.txt", "\n\ufe0f\n".join(TEXTS)),
    ],
)
def test_each_article_is_a_document(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode())
    tokenizer = tiny_tokenizer()
    corpus = tokenize_files([tmp_path / name], tokenizer, cache_dir=tmp_path / "c", workers=1)
    found = [tokenizer.decode([int(i) for i in corpus[n]]) for n in range(len(corpus))]
    assert found == TEXTS


@pytest.mark.parametrize("prompt", ["-今", "--今天", "-5度"])
@pytest.mark.parametrize("command", ["generate", "score"])
def test_a_text_that_begins_with_a_hyphen_is_told_of_the_two_hyphens(
    command: str, prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.safetensors"
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(path, tokenizer=tokenizer)
    assert main([command, str(path), prompt]) == 2
    err = capsys.readouterr().err
    assert "behind --" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "missing", "今\udcff"],
        ["generate", "missing", "今", "--stop", "\udce4\udcbb"],
        ["generate", "missing", "今", "--ban", "\udcff"],
        ["score", "missing", "\udcff"],
    ],
)
def test_bytes_that_are_no_utf8_are_told_before_a_file_is_opened(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "isn't UTF-8" in err
    assert "missing" not in err
    assert err.count("\n") == 1
