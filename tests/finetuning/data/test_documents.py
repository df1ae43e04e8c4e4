"""Files to documents: every format is read, and whatever cannot be is one line that says where."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2ml_torch.finetuning.data import documents as documents_module
from gpt2ml_torch.finetuning.data import lines as lines_module
from gpt2ml_torch.finetuning.data.cache import tokenize_files
from gpt2ml_torch.finetuning.data.documents import DocumentReader
from gpt2ml_torch.finetuning.data.files import Source, find_sources
from gpt2ml_torch.finetuning.data.lines import Numbered
from tests.helpers.finetuning_data import small_tokenizer, write_jsonl
from tests.helpers.properties import example, given, st

POEM = "春眠不觉晓\n处处闻啼鸟\n\n夜来风雨声\n \n\n花落知多少"


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard", reason="needs the package zstandard")
    return zstandard.ZstdCompressor().compress(data)


def documents(path: Path, separator: str = "blank-line") -> list[str]:
    """The documents' texts, prompts and what is learned divided by a bar."""
    found, text = [], ""
    reader = DocumentReader(small_tokenizer().encode, separator=separator)  # type: ignore[arg-type]
    for source in find_sources(path):
        for piece in reader.read(source):
            text += piece.text + ("" if piece.learned else "|")
            if piece.ends:
                found.append(text)
                text = ""
    assert not text
    return found


def test_text_is_divided_at_blank_lines_at_each_line_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "poem.txt"
    file.write_text(POEM, encoding="utf-8")
    split = {kind: documents(file, kind) for kind in ("blank-line", "line", "file")}
    assert split["blank-line"] == ["春眠不觉晓\n处处闻啼鸟\n", "夜来风雨声\n", "花落知多少"]
    assert split["line"] == ["春眠不觉晓\n", "处处闻啼鸟\n", "夜来风雨声\n", "花落知多少"]
    assert split["file"] == ["春眠不觉晓\n处处闻啼鸟\n夜来风雨声\n花落知多少"]


def test_a_document_comes_in_pieces_before_all_of_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "PIECE_CHARACTERS", 8)
    monkeypatch.setattr(lines_module, "BLOCK_BYTES", 64)
    file = tmp_path / "long.txt"
    file.write_text("春眠不觉晓\n" * 200, encoding="utf-8")
    (source,) = find_sources(file)
    read = 0

    def count(size: int) -> None:
        nonlocal read
        read += size

    pieces = DocumentReader(small_tokenizer().encode).read(source, progress=count)
    assert next(pieces).text == "春眠不觉晓\n" * 2
    assert read < 200
    assert [piece.ends for piece in pieces].count(True) == 1


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    plain, windows = tmp_path / "plain.txt", tmp_path / "windows.txt"
    plain.write_bytes(POEM.encode())
    windows.write_bytes(b"\xef\xbb\xbf" + POEM.replace("\n", "\r\n").encode())
    tokens = [[tokenizer.encode(text) for text in documents(file)] for file in (plain, windows)]
    assert tokens[0] == tokens[1]


def test_json_lines_hold_texts_or_prompts_with_completions(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    lines = ['{"text": "春", "source": 3}', "", '{"prompt": "眠", "completion": "不"}']
    lines.append('{"prompt": "", "completion": "觉"}')
    file.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    assert documents(file) == ["春", "眠|不", "觉"]


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)]
)
def test_compressed_files_read_as_plain_ones_also_in_several_parts(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    text = (POEM * 3000).encode()
    (tmp_path / "poem.txt").write_bytes(text)
    packed = tmp_path / f"poem.txt{suffix}"
    packed.write_bytes(compress(text[:200_001]) + compress(b"") + compress(text[200_001:]))
    assert documents(packed) == documents(tmp_path / "poem.txt")


def test_a_folder_is_searched_in_sorted_order_and_hidden_and_other_files_are_left_out(
    tmp_path: Path,
) -> None:
    for name in ("b.txt", "a/z.jsonl.gz", "a/y.TXT", ".hidden.txt", ".git/c.txt", "model.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_sources([tmp_path / "b.txt", tmp_path, str(tmp_path / "**" / "*.txt")])
    assert [str(s.path.relative_to(tmp_path)) for s in found] == [
        "b.txt",
        "a/y.TXT",
        "a/z.jsonl.gz",
    ]
    assert [(s.kind, s.compression) for s in found[1:]] == [("text", None), ("json", "gzip")]


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    file = tmp_path / "poem[1].txt"
    file.write_text("春")
    assert [source.path for source in find_sources(str(file))] == [file]


TEXTS = st.text(alphabet="春眠,。 abΣsσ\u0301\u3000\t\x0c\x1f\u200bé\U0001d165\u0315", max_size=60)


@given(text=TEXTS, size=st.integers(1, 12))
@example(text="aaa\x1fb", size=1)  # a control that joins what it stands between
def test_the_tokens_of_the_pieces_are_those_of_the_whole(text: str, size: int) -> None:
    tokenizer = small_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "PIECE_CHARACTERS", size)
        pieces = list(documents_module.portions(text))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    tokens = [id_ for piece in pieces for id_ in tokenizer.encode(piece.text)]
    assert tokens == tokenizer.encode(text)


@given(lines=st.lists(TEXTS, max_size=8), size=st.integers(1, 12))
def test_a_long_document_comes_in_pieces_with_the_same_tokens(lines: list[str], size: int) -> None:
    tokenizer = small_tokenizer()
    numbered = [Numbered(number, f"{line}\n") for number, line in enumerate(lines, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "PIECE_CHARACTERS", size)
        reader = DocumentReader(tokenizer.encode, separator="file")
        source = Source(Path("a.txt"), "text", None, named=True)
        pieces = list(reader._text_pieces(source, numbered))
    assert [piece.ends for piece in pieces][-1:] == [True] * bool(pieces)
    assert sum(piece.ends for piece in pieces) <= 1
    tokens = [id_ for piece in pieces for id_ in tokenizer.encode(piece.text)]
    assert tokens == tokenizer.encode("\n".join(lines))


GOOD = {"text": "春眠"}
CUT = gzip.compress(os.urandom(5000).hex().encode())[:-900]
BAD_FILES = {
    # name of the file, its bytes, and what the message must say, file and line included
    "bad byte": ("a.txt", "春\n眠\n不".encode() + b"\xff\n", ["a.txt, line 3", "0xff", "UTF-8"]),
    "cut character": ("a.txt", "春\n眠".encode()[:-1], ["a.txt, line 2", "UTF-8"]),
    "coded surrogate": ("a.txt", b"\xed\xa0\x80", ["a.txt, line 1", "UTF-8"]),
    "gb18030": ("a.txt", "春眠不觉晓".encode("gb18030"), ["a.txt, line 1", "iconv -f GB18030"]),
    "utf-16": ("a.txt", "春眠".encode("utf-16"), ["a.txt, line 1", "iconv -f UTF-16"]),
    "utf-16 unmarked": ("a.txt", "ab\ncd".encode("utf-16-le"), ["a.txt, line 1", "NUL"]),
    "binary": ("a.txt", b"ab\ncd\0ef", ["a.txt, line 2", "NUL"]),
    "gzip named txt": ("a.txt", gzip.compress(b"ab"), ["a.txt, line 1", ".gz"]),
    "zip": ("a.txt", b"PK\x03\x04\xff\xfe", ["a.txt, line 1", "zip"]),
    "empty": ("a.txt", b"", ["a.txt, line 1", "empty"]),
    "only blank lines": ("a.txt", b"\n \r\n\xe3\x80\x80\n", ["a.txt", "empty"]),
    "only a mark": ("a.txt", b"\xef\xbb\xbf", ["a.txt", "empty"]),
    "only controls": ("a.txt", b"\x01\x02", ["a.txt", "empty"]),
    "empty jsonl": ("a.jsonl", b"\n\n", ["a.jsonl", "empty"]),
    "empty gzip": ("a.txt.gz", gzip.compress(b""), ["a.txt.gz", "empty"]),
    "truncated gzip": ("a.txt.gz", CUT, ["a.txt.gz", "line 1", "gzip", "fetch"]),
    "not gzip": ("a.txt.gz", b"plain text", ["a.txt.gz", "line 1", "gzip"]),
    "zero bytes named gz": ("a.txt.gz", b"", ["a.txt.gz", "empty"]),
    "truncated xz": ("a.txt.xz", lzma.compress(b"ab" * 999)[:-9], ["a.txt.xz", "line", "xz"]),
    "not xz": ("a.txt.xz", b"plain text", ["a.txt.xz", "line 1", "xz"]),
    "not zstd": ("a.txt.zst", b"plain text", ["a.txt.zst", "line 1", "zstd"]),
    "bad json": ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl, line 2", "not JSON"]),
    "two objects": ("a.jsonl", b'{"text": "a"} {"text": "b"}', ["a.jsonl, line 1", "not JSON"]),
    "cut array": ("a.json", b'[\n{"text": "a"},\n', ["a.json, line 3", "ends inside a value"]),
    "two arrays": ("a.json", b'["a"]\n["b"]', ["a.json, line 2", "more after the array"]),
    "no comma": ("a.json", b'["a"\n"b"]', ["a.json, line 2", "not JSON", "column 1"]),
    "bad element": ("a.json", b'["a",\n {"text": tru}]', ["a.json, line 2", "column 11"]),
    "array inside": ("a.json", b'{"data": ["a"]}', ["a.json, line 1", "jq -c '.data[]'"]),
    "deep json": ("a.jsonl", b"[" * 200_000, ["a.jsonl, line 1", "not JSON"]),
    "long number": ("a.jsonl", b'{"text": ' + b"1" * 9999 + b"}", ["a.jsonl, line 1"]),
    "a lone number": ("a.jsonl", b'"text"\n7', ["a.jsonl, line 2", "found a number", "expected"]),
    "an array": ("a.jsonl", b'[["a"]]', ["a.jsonl, line 1", "found an array", "expected"]),
    "null": ("a.jsonl", b"null", ["a.jsonl, line 1", "text is empty"]),
    "no field": ("a.jsonl", b'{"story": "a"}', ["a.jsonl, line 1", "no field text", "story"]),
    "empty object": ("a.jsonl", b"{}", ["a.jsonl, line 1", "no field text"]),
    "no completion": ("a.jsonl", b'{"prompt": "a"}', ["a.jsonl, line 1", "no completion"]),
    "no prompt": ("a.jsonl", b'{"completion": "a"}', ["a.jsonl, line 1", "no prompt"]),
    "both": ("a.jsonl", b'{"text": "a", "prompt": "b"}', ["a.jsonl, line 1", "both"]),
    "a number": ("a.jsonl", b'{"text": 7}', ["a.jsonl, line 1", "text is a number", "string"]),
    "null text": ("a.jsonl", b'{"text": null}', ["a.jsonl, line 1", "text is empty"]),
    "list": ("a.jsonl", b'{"text": [["a"]]}', ["a.jsonl, line 1", "text is an array"]),
    "true": ("a.jsonl", b'{"prompt": true, "completion": "a"}', ["line 1", "prompt is true"]),
    "empty text": ("a.jsonl", b'{"text": " "}', ["a.jsonl, line 1", "text is empty"]),
    "nothing to learn": (
        "a.jsonl",
        b'{"prompt": "a", "completion": ""}',
        ["a.jsonl, line 1", "text is empty"],
    ),
    "surrogate": ("a.jsonl", b'{"text": "\\ud83d"}', ["a.jsonl, line 1", "surrogate"]),
    "bad byte in json": ("a.jsonl", b'{"text": "a"}\n{"text": "\xb4\xba"}', ["a.jsonl, line 2"]),
}


def one_line(error: BaseException) -> str:
    text = str(error)
    assert len(text.splitlines()) == 1, text
    return text


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_file_and_line(case: str, tmp_path: Path) -> None:
    name, data, expected = BAD_FILES[case]
    if name.endswith(".zst"):
        pytest.importorskip("zstandard", reason="needs the package zstandard")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the texts are checked below)
        tokenize_files(tmp_path / name, small_tokenizer(), cache_dir=tmp_path / "cache")
    message = one_line(caught.value)
    assert [part for part in expected if part not in message] == [], message
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("cut", [1, 3, 40, 4000])
def test_a_truncated_zstd_file_is_an_error_wherever_it_ends(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "a.txt.zst"
    file.write_bytes(zstd(os.urandom(9000).hex().encode())[:-cut])
    with pytest.raises(ValueError, match=r"a\.txt\.zst ends before its zstd data does.*line 1"):
        documents(file)


def test_bad_names_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.bin").write_bytes(b"x")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    bad = ["missing.txt", "*.csv", "folder", "dangling.txt", "loop.txt", "pipe.txt", "a\nb.txt"]
    for name in bad:
        with pytest.raises((ValueError, OSError)) as caught:
            tokenize_files(str(tmp_path / name), small_tokenizer(), cache_dir=tmp_path / "c")
        assert name.strip("*").replace("\n", "\\n") in one_line(caught.value)
    with pytest.raises(ValueError, match="no data was named"):
        find_sources([])


def test_an_empty_file_met_in_a_folder_is_counted_and_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("春眠")
    (tmp_path / "data" / "b.txt").write_text("\n")
    corpus = tokenize_files(tmp_path / "data", small_tokenizer(), cache_dir=tmp_path / "cache")
    assert (len(corpus), corpus.meta["empty_files"]) == (1, 1)
    assert "b.txt is empty" in caplog.text
    (tmp_path / "data" / "a.txt").write_text("")
    with pytest.raises(ValueError, match="no text was found in 2 file"):
        tokenize_files(tmp_path / "data", small_tokenizer(), cache_dir=tmp_path / "cache")


def test_a_line_without_end_is_an_error_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_CHARACTERS", 1000)
    file = tmp_path / "a.txt"
    file.write_bytes(b"ab\n" + b"c" * 600_000)
    with pytest.raises(
        ValueError, match=r"a\.txt, line 2: the line is longer than 1,000 characters"
    ):
        documents(file)


def test_zstd_files_with_the_longest_window_are_read(tmp_path: Path) -> None:
    if sys.version_info < (3, 14):
        pytest.importorskip("zstandard", reason="needs the package zstandard")
    text = "白日依山尽。\n".encode()
    window, last_raw_block = bytes([(31 - 10) << 3]), (len(text) << 3 | 1).to_bytes(3, "little")
    frame = b"\x28\xb5\x2f\xfd" + b"\0" + window + last_raw_block + text
    (tmp_path / "a.txt.zst").write_bytes(frame)
    (tmp_path / "a.txt").write_bytes(text)
    assert documents(tmp_path / "a.txt.zst") == documents(tmp_path / "a.txt")


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python 3.14 reads zstd by itself")
def test_without_zstandard_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(ValueError, match="pip install zstandard"):
        documents(tmp_path / "a.txt.zst")


def test_bad_options_are_one_line_each(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [GOOD])
    bad = [
        ({"separator": "page"}, "separator is 'page'"),
        ({"end_token": "[EOS]"}, r"'\[EOS\]' is not in the vocabulary"),
        ({"end_token": "[PAD]"}, r"'\[PAD\]' is padding"),
        ({"workers": -1}, "workers is -1"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            tokenize_files(file, small_tokenizer(), cache_dir=tmp_path / "c", **options)  # type: ignore[arg-type]
    assert json.loads(file.read_text()) == GOOD
