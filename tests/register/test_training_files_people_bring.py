"""Training files as people have them, by example and variation. More of each kind is in
tests/finetuning/data/test_records.py and test_lines.py."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gpt2ml_torch.__main__ import main
from gpt2ml_torch.finetuning import tokenize_files
from gpt2ml_torch.finetuning.data.documents import DocumentReader
from gpt2ml_torch.finetuning.data.files import find_sources
from tests.helpers.finetuning_data import small_tokenizer
from tests.helpers.tiny import tiny_tokenizer

TEXTS = ["今天天气不错", "春眠不觉晓", "处处闻啼鸟"]


def lines(*values: object) -> str:
    return "\n".join(json.dumps(value, ensure_ascii=False) for value in values)


FILES = [
    ("a.json", "\ufeff" + json.dumps(TEXTS)),
    ("b.json", json.dumps([{"text": text} for text in TEXTS], indent=2)),
    ("c.json", json.dumps([*TEXTS, "", "  "])),
    ("d.jsonl", lines(*TEXTS)),
    ("e.jsonl", "\n".join("\ufeff" + lines({"text": text}) for text in TEXTS)),
    ("f.jsonl", lines(*({"content": text} for text in [*TEXTS, ""]))),
    ("g.jsonl", lines(*({"text": text} for text in [*TEXTS, None]), None)),
    ("h.txt", "\n\u200b\n".join(TEXTS)),
    ("i.txt", "\r\ufeff\r".join(TEXTS)),
    ("j.txt", "\n\u00ad \u2060\n".join(TEXTS)),
    ("k.txt", "\n\ufe0f\n".join(TEXTS)),
    ("l.json", json.dumps([{"paragraphs": [text], "author": "孟浩然"} for text in TEXTS])),
    ("m.txt", json.dumps(TEXTS, ensure_ascii=False)),
    ("n.txt", lines(*({"text": text} for text in TEXTS))),
    ("o", json.dumps([{"content": text} for text in TEXTS], indent=1)),
]


@pytest.mark.parametrize(("name", "content"), FILES, ids=lambda value: value[:1])
def test_each_article_is_a_document(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode())
    tokenizer = tiny_tokenizer()
    corpus = tokenize_files([tmp_path / name], tokenizer, cache_dir=tmp_path / "c", workers=1)
    found = [tokenizer.decode([int(i) for i in corpus[n]]) for n in range(len(corpus))]
    assert found == TEXTS


def read(path: Path) -> str:
    """The documents; a bar stands behind each part that is not learned, a slash behind each."""
    reader = DocumentReader(small_tokenizer().encode)
    pieces = (piece for source in find_sources(path) for piece in reader.read(source))
    return "".join(p.text + ("" if p.learned else "|") + ("/" if p.ends else "") for p in pieces)


def turns(*texts: str, who: str = "role", what: str = "content") -> list[dict[str, str]]:
    names = ("user", "assistant") if who == "role" else ("human", "gpt")
    return [{who: names[number % 2], what: text} for number, text in enumerate(texts)]


RECORDS: list[tuple[dict[str, Any], str, str]] = [
    ({"title": "春", "content": "眠"}, "春\n眠/", "title, content"),
    ({"title": "", "content": "眠"}, "眠/", "title, content"),
    ({"title": "春", "body": "眠"}, "春\n眠/", "title, body"),
    ({"title": "春", "paragraphs": ["眠", "不"]}, "春\n眠\n不/", "title, paragraphs"),
    (
        {"instruction": "春", "input": "眠", "output": "不"},
        "春\n眠|不/",
        "instruction, input -> output",
    ),
    (
        {"instruction": "春", "input": None, "output": "不", "history": []},
        "春|不/",
        "instruction, input -> output",
    ),
    ({"query": "春", "answer": "不"}, "春|不/", "query -> answer"),
    ({"messages": turns("春", "眠")}, "春|眠/", "messages"),
    ({"conversations": turns("春", "眠", who="from", what="value")}, "春|眠/", "conversations"),
    ({"conversation": [{"human": "春", "assistant": "眠"}]}, "春|眠/", "conversation"),
]


@pytest.mark.parametrize(("record", "text", "shape"), RECORDS)
def test_a_record_is_recognised_and_the_shape_told(
    record: dict[str, Any],
    text: str,
    shape: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([record, record]), encoding="utf-8")
    with caplog.at_level(logging.INFO):
        assert read(path) == 2 * text
    assert caplog.messages == [f"{path}, line 1: read as {shape}"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", json.dumps(TEXTS), "holds JSON and is read as such"),
        ("a", lines({"text": "春"}), "holds JSON and is read as such"),
        ("a.txt", lines(*TEXTS) + "\n", "JSON Lines of strings are named .jsonl"),
        ("a.csv", "标题,内容\n春,眠\n", "is read as text, with all its marks"),
        ("a.html", "<html><p>春</p></html>", "is read as text, with all its marks"),
    ],
)
def test_a_name_that_says_something_else_is_told(
    name: str, content: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    read(tmp_path / name)
    assert said in caplog.text


@pytest.mark.parametrize(
    "text", ["[1] 春眠\n\n[2] 不觉", "{春}\n眠", '"春眠"，他说。\n', "[春, 眠]"]
)
def test_text_that_begins_like_json_stays_text(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read(tmp_path / "a.txt").replace("/", "").split() == text.split()
    assert caplog.text == ""


ENCODED = [
    ("gb18030", "GB18030", "床前明月光，疑是地上霜。"),
    ("gb18030", "GB18030", "學而時習之，不亦說乎"),
    ("gb18030", "GB18030", "网路"),
    ("big5", "Big5", "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。" * 200),
    ("big5", "Big5", "學習"),
    ("big5", "Big5", "臺灣"),
    ("utf-16", "UTF-16", "春眠"),
    ("utf-16-le", "UTF-16", "第一章 开始"),
    ("utf-16-be", "UTF-16", "第一章 開始"),
]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize(("codec", "called", "text"), ENCODED)
def test_the_advice_for_another_encoding_works_when_followed(
    codec: str, called: str, text: str, name: str, tmp_path: Path
) -> None:
    text = text if name == "a.txt" else lines({"text": text})
    old, new = tmp_path / name, tmp_path / f"new{name}"
    old.write_bytes(text.encode(codec))
    with pytest.raises(ValueError, match=f"perhaps {called}: iconv") as caught:
        read(old)
    command = re.search(r"iconv .*NEW", str(caught.value))
    assert command is not None
    filled = command[0].replace("OLD", str(old)).replace("NEW", str(new))
    subprocess.run(filled, shell=True, check=True)
    assert new.read_text("utf-8").removeprefix("\ufeff") == text
    assert read(new)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid x\n", "run `git lfs pull`"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "a web page, not a training file"),
        ("a.txt.crdownload", "春".encode(), "a download that isn't finished"),
        ("a.docx", b"PK\3\4\xff", "a zip archive"),
    ],
)
def test_what_is_no_training_file_is_called_what_it_is(
    name: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"), [("a.md", "<!-- 春 -->"), ("a.txt", "<?php 春"), ("a.tmp", "MZ世代，BZh")]
)
def test_text_that_begins_like_something_else_is_text(
    name: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / f"{name}.tmp").write_text("of an editor")
    assert read(tmp_path / name) == f"{content}/"


def test_one_empty_text_among_thousands_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(*[{"text": "春眠"}] * 3000, {"text": ""}))
    corpus = tokenize_files(tmp_path / "a.jsonl", tiny_tokenizer(), cache_dir=tmp_path / "c")
    assert (len(corpus), corpus.meta["empty_texts"]) == (3000, 1)


@pytest.mark.parametrize(
    ("record", "advised", "options"),
    [
        ({"story": "春眠"}, "--text-field", ["--text-field", "story"]),
        (
            {"q": "春", "a": ["眠", "不"]},
            "--prompt-field and --completion-field",
            ["--prompt-field", "q", "--completion-field", "a"],
        ),
    ],
)
def test_the_advice_to_name_fields_works_when_followed(
    record: dict[str, Any],
    advised: str,
    options: list[str],
    tuning_files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.jsonl").write_text(lines(*[{**record, "id": n} for n in range(9)]))
    words = ["finetune", str(tuning_files / "model.safetensors"), str(tmp_path / "a.jsonl")]
    words += ["--out", str(tmp_path / "t.safetensors"), "--steps", "1", "--valid-share", "0"]
    words += ["--cache", str(tmp_path / "cache"), "--min-tokens", "1"]
    assert main(words) == 2
    assert advised in capsys.readouterr().err
    assert main([*words, *options]) == 0, capsys.readouterr().err
