"""The shapes of training files that people have are recognised, or read by the fields named."""

from __future__ import annotations

import json
import logging
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from gpt2ml_torch.finetuning.data import lines as lines_module
from gpt2ml_torch.finetuning.data.cache import tokenize_files
from gpt2ml_torch.finetuning.data.documents import DocumentReader
from gpt2ml_torch.finetuning.data.files import find_sources
from gpt2ml_torch.finetuning.data.records import Fields
from gpt2ml_torch.finetuning.data.rows import RowDataset
from gpt2ml_torch.finetuning.data.summary import summarize
from tests.helpers.finetuning_data import NumberTokenizer, small_tokenizer, write_jsonl


def documents(path: Path, fields: Fields | None = None) -> list[str]:
    """The documents; a bar stands behind each part that is not learned."""
    reader = DocumentReader(small_tokenizer().encode, fields=fields)
    pieces = [piece for source in find_sources(path) for piece in reader.read(source)]
    text = "".join(
        piece.text + ("" if piece.learned else "|") + ("\0" if piece.ends else "")
        for piece in pieces
    )
    assert text.endswith("\0")
    return text.split("\0")[:-1]


USER, BOT = {"role": "user", "content": "春"}, {"role": "assistant", "content": "眠"}
SHAPES: dict[str, tuple[Any, str]] = {
    "strings": ("春眠", "春眠"),
    "text": ({"text": "春眠", "id": 7}, "春眠"),
    "content": ({"content": "春眠", "url": "x"}, "春眠"),
    "title, content": ({"title": "春", "content": "眠"}, "春\n眠"),
    "prompt -> completion": ({"prompt": "春", "completion": "眠"}, "春|眠"),
    "instruction, input -> output": (
        {"instruction": "春", "input": "眠", "output": "不"},
        "春\n眠|不",
    ),
    "instruction -> output": ({"instruction": "春", "output": "不"}, "春|不"),
    "question -> answer": ({"question": "春", "answer": "不"}, "春|不"),
    "messages": ({"messages": [{"role": "system", "content": "觉"}, USER, BOT]}, "觉|春|眠"),
    "conversations": (
        {"conversations": [{"from": "human", "value": "春"}, {"from": "gpt", "value": "眠"}]},
        "春|眠",
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["lines", "array", "indented array", "indented objects"])
def test_a_shape_is_recognised_in_every_layout_and_told(
    tmp_path: Path, shape: str, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    value, text = SHAPES[shape]
    lines = [json.dumps(value, ensure_ascii=False)] * 3
    if layout == "array":
        lines = [f"[{', '.join(lines)}]"]
    elif layout == "indented array":
        lines = json.dumps([value] * 3, ensure_ascii=False, indent=2).split("\n")
    elif layout == "indented objects":
        lines = json.dumps(value, ensure_ascii=False, indent="\t").split("\n") * 3
    file = tmp_path / "train.json"
    file.write_text("\n".join(lines), encoding="utf-8")
    with caplog.at_level(logging.INFO):
        assert documents(file) == [text] * 3
    assert caplog.messages == [f"{file}, line {1 + (layout[:10] == 'indented a')}: read as {shape}"]
    corpus = tokenize_files(file, small_tokenizer(), cache_dir=tmp_path / "cache")
    assert corpus.meta["shapes"] == {shape: 3}
    assert f"3 of {shape}" in str(summarize(RowDataset(corpus), small_tokenizer()))


def test_named_fields_are_read_whatever_else_is_there(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "春", "body": "眠", "q": "不", "a": "觉"}])
    assert documents(file, Fields(text="body")) == ["眠"]
    assert documents(file, Fields(prompt="q", completion="a")) == ["不|觉"]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: no field 'b'; found 'text', 'body'"):
        documents(file, Fields(text="b"))
    for bad in ({"prompt": "q"}, {"completion": "a"}, {"text": "t", "completion": "a"}):
        with pytest.raises(ValueError, match="_field is set without"):
            Fields(**bad)
    with pytest.raises(ValueError, match="both text_field and prompt_field are set"):
        Fields(text="t", prompt="q", completion="a")
    with pytest.raises(ValueError, match="text_field is empty"):
        Fields(text="")


@pytest.mark.parametrize(
    "empty", ['""', '{"text": ""}', '{"text": null}', '{"text": "\\u200b "}', '{"text": "\\ufeff"}']
)
def test_an_empty_text_among_others_is_counted_and_told(tmp_path: Path, empty: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "春眠"}\n' + f"{empty}\n" + '{"text": "不觉"}\n', encoding="utf-8")
    corpus = tokenize_files(file, small_tokenizer(), cache_dir=tmp_path / "cache")
    assert (len(corpus), corpus.meta["empty_texts"]) == (2, 1)
    warnings = summarize(RowDataset(corpus), small_tokenizer()).warnings
    assert "1 empty text(s) left out" in warnings


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        (["春"], "turn 1 of messages is a string"),
        ([USER, {"content": "春"}], "role in turn 2 of messages is null"),
        ([{"role": "poet", "content": "春"}], 'role in turn 1 of messages is "poet"'),
        ([{"role": "user", "content": 3}], "content of turn 1 of messages is a number"),
        ([USER], "the text is empty"),
    ],
)
def test_a_conversation_that_is_none_is_one_line(tmp_path: Path, turns: Any, problem: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 1: .*{problem}"):
        tokenize_files(file, small_tokenizer(), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("length", [3, 4, 64])
def test_of_a_conversation_only_the_answers_are_learned(
    tmp_path: Path, length: int, pack: bool
) -> None:
    def turn(role: str, *numbers: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(map(str, numbers))}

    talk = [turn("user", 10, 11), turn("assistant", 12, 13, 14), turn("user", 15, 16, 17, 18)]
    talk += [turn("assistant", 19, 20), turn("user", 21)]  # a question without an answer
    other = [turn("assistant", 30, 31), turn("system", 32), turn("assistant", 33)]
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": talk}, {"messages": other}])
    corpus = tokenize_files(file, NumberTokenizer(), cache_dir=tmp_path / "cache")
    assert [corpus[0].tolist(), corpus[1].tolist()] == [[*range(10, 21)], [30, 31, 32, 33]]
    rows = RowDataset(corpus, length=length, overlap=1, pack=pack)
    learned = sorted(int(x) for i in range(len(rows)) for x in rows[i].labels if x)
    assert learned == [12, 13, 14, 19, 20, 31, 33]
    assert rows.num_targets == len(learned)
    for row in (rows[i] for i in range(len(rows))):
        for place in row.labels.nonzero().flatten().tolist():
            assert row.labels[place] == row.token_ids[place] + 1


def test_a_large_array_on_one_line_is_read_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "BLOCK_BYTES", 1 << 12)
    file = tmp_path / "train.json"
    file.write_text(json.dumps([f"春{i}" * 20 for i in range(8_000)]), encoding="utf-8")
    reader = DocumentReader(lambda text: [1])
    tracemalloc.start()
    count = sum(1 for source in find_sources(file) for _ in reader.read(source))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8_000
    assert peak < 1 << 18 < file.stat().st_size // 2


def test_values_do_not_depend_on_where_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = ["春", 'a\\"\n', {"text": "\U0001f600", "n": [1.5e10, -3, True, None]}, "x" * 50]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(values, indent=1), encoding="utf-8")
    for size in range(1, 40):
        monkeypatch.setattr(lines_module, "BLOCK_BYTES", size)
        assert documents(file) == ["春", 'a\\"\n', "\U0001f600", "x" * 50]


TEXTS = {
    "GB18030": ("gb18030", "床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"),
    "GB18030 beyond ASCII lines": ("gb18030", "abc\n" * 50_000 + "床前明月光，疑是地上霜。"),
    "Big5": ("big5", "床前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。"),
    "Big5 in a word": ("big5", "學習網路電腦"),
    "UTF-16": ("utf-16", "床前明月光"),
    "UTF-16 unmarked": ("utf-16-le", "床前 abc，疑是地上霜。"),
    "UTF-16 big-endian": ("utf-16-be", "床前明月光，疑是地上霜。"),
    "UTF-32": ("utf-32", "床前明月光"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_advice_for_another_encoding_works_when_followed(tmp_path: Path, name: str) -> None:
    codec, text = TEXTS[name]
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_bytes(text.encode(codec))
    with pytest.raises(ValueError, match=name.split()[0]) as caught:
        documents(old)
    command = str(caught.value).split(f"{name.split()[0]}: ")[1].split(")")[0]
    command = command.replace("OLD", str(old)).replace("NEW", str(new))
    subprocess.run(command, shell=True, check=True)
    assert new.read_text("utf-8").removeprefix("\ufeff") == text
    assert len(documents(new)) == 1


def test_utf8_with_one_damaged_place_is_not_taken_for_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("床前明月光\n".encode() + "疑是地上霜".encode("gb18030"))
    with pytest.raises(ValueError, match=r"a\.txt, line 2: .*damaged, or joined") as caught:
        documents(file)
    assert "GB18030" not in str(caught.value)
