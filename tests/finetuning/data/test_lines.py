"""Articles stay apart whatever blank lines and line ends look like; odd sizes take linear time."""

from __future__ import annotations

import gzip
import io
import logging
import lzma
import time
import tracemalloc
from pathlib import Path

import pytest

from gpt2ml_torch.finetuning.data import compressed as compressed_module
from gpt2ml_torch.finetuning.data import lines as lines_module
from gpt2ml_torch.finetuning.data.files import Source
from gpt2ml_torch.finetuning.data.lines import read_blocks, read_lines
from gpt2ml_torch.tokenizer import Tokenizer
from tests.finetuning.data.test_documents import documents
from tests.helpers.finetuning_data import small_tokenizer
from tests.helpers.properties import given, st

# Everything that the tokenizer drops or takes for white space, a few of each kind.
INVISIBLE = ["\u200b", "\ufeff", "\u200b \ufeff", "\u00ad\u200e", "\x01", "\u0301", "\u3000\u00a0"]
INVISIBLE += ["\u2060", "\u180e", "\ufffd", "\U000e0041", "\ufe0f", "\x7f\x80"]


def words(path: Path, separator: str = "blank-line") -> list[list[str]]:
    """The words of each document."""
    return [text.split() for text in documents(path, separator)]


@pytest.mark.parametrize("blank", INVISIBLE, ids=ascii)
def test_a_line_of_which_the_tokenizer_keeps_nothing_divides_articles(
    tmp_path: Path, blank: str
) -> None:
    assert not Tokenizer(["[PAD]", "[UNK]"]).encode(blank)
    file = tmp_path / "a.txt"
    file.write_text(f"春眠\n{blank}\n不觉晓\n{blank}\n", encoding="utf-8")
    assert words(file) == [["春眠"], ["不觉晓"]]
    file.write_text(f"春眠\n{blank}晓\n", encoding="utf-8")  # and only such a line
    assert len(documents(file)) == 1
    file.write_text(f"春眠\n{blank}\n\n不觉晓\n", encoding="utf-8")
    assert words(file, "line") == [["春眠"], ["不觉晓"]]


def test_an_unknown_character_is_not_blank(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("春眠\n☃\n不觉晓\n", encoding="utf-8")
    assert small_tokenizer().encode("☃") == [1]
    assert len(documents(file)) == 1


@pytest.mark.parametrize(
    "end", ["\n", "\r\n", "\r", "\r\r\n", "\u2028", "\u2029", "\x85", "\v", "\f"]
)
def test_every_kind_of_line_end_divides_lines_and_articles(tmp_path: Path, end: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(end.join(["春", "眠", "", "不", " ", "觉", "晓"]).encode())
    assert [len("".join(text.split())) for text in documents(file)] == [2, 1, 2]
    assert words(file, "line") == [["春"], ["眠"], ["不"], ["觉"], ["晓"]]


@pytest.mark.parametrize(
    "mixed", ["春\u2028\n眠\n", "春\n\f眠\n", "春\f\n眠\n", "春\u2029眠\n晓\n"]
)
def test_one_rare_line_end_beside_a_line_feed_or_in_a_line_divides_no_article(
    tmp_path: Path, mixed: str
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(mixed.encode())
    assert len(documents(file)) == 1


def test_a_rare_line_end_kept_inside_a_line_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("春\u2028眠\n晓\u2028\n不\u2028觉\n".encode())
    with caplog.at_level(logging.WARNING):
        assert len(documents(file, "line")) == 3
    assert caplog.text.count("a.txt, line 1: U+2028 inside a line is kept as white space") == 1


TEXT = st.text(alphabet="春a \n\r\ufeff\u200b\U0001f600", max_size=40)


@given(text=TEXT, size=st.integers(1, 9))
def test_lines_do_not_depend_on_where_blocks_end(text: str, size: int) -> None:
    source = Source(Path("a.txt"), "text", None, named=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines_module, "BLOCK_BYTES", size)
        blocks = read_blocks(source, io.BufferedReader(io.BytesIO(text.encode())))
        found = list(read_lines(source, blocks))
    # Runs of blank lines may be one item; a run of CR is never more than two lines apart.
    whole = read_blocks(source, io.BufferedReader(io.BytesIO(text.encode())))
    expected = list(read_lines(source, whole))
    numbered = [(line.line, line.text) for line in found if not line.text.isspace()]
    assert numbered == [(line.line, line.text) for line in expected if not line.text.isspace()]


def test_a_byte_order_mark_at_any_lines_start_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('\ufeff{"text": "春"}\n\ufeff\ufeff{"text": "眠"}\n', encoding="utf-8")
    assert documents(file) == ["春", "眠"]
    file.write_text('\ufeff\n\ufeff"春\ufeff"\n', encoding="utf-8")
    assert documents(file) == ["春\ufeff"]


@pytest.mark.parametrize("blank", [b"\n", b" \n", b"\r", b"\t\r\n", "\u3000\n".encode()])
def test_gigabytes_of_blank_lines_take_no_time_and_keep_the_line_numbers(
    tmp_path: Path, blank: bytes
) -> None:
    file = tmp_path / "a.txt"
    count = (8 << 20) // len(blank)
    file.write_bytes(b"ab\n" + blank * count + b"\xff")
    began = time.process_time()
    with pytest.raises(ValueError, match=rf"a\.txt, line {count + 2}: byte 0xff"):
        documents(file)
    assert time.process_time() - began < 3  # one by one, they take longer


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress)])
@pytest.mark.parametrize("data", [b"\n", b"ab "])
def test_a_decompression_bomb_is_refused_early(
    tmp_path: Path, suffix: str, compress: object, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed_module, "_FREE_BYTES", 1 << 20)
    file = tmp_path / f"a.txt.{suffix}"
    file.write_bytes(compress(data * (2 << 20)))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"a\.txt\..z unpacks to more than 200 times its size"):
        documents(file)


def test_a_zstd_bomb_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed_module, "_FREE_BYTES", 1 << 20)
    monkeypatch.setattr(compressed_module, "_ZSTD_BYTES", 1 << 7)
    zstandard = pytest.importorskip("zstandard", reason="needs the package zstandard")
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    packed = [compressor.compress(bytes(1 << 20).replace(b"\0", b"\n")) for _ in range(64)]
    file = tmp_path / "a.txt.zst"
    file.write_bytes(b"".join([*packed, compressor.flush()]))
    tracemalloc.start()
    with pytest.raises(ValueError, match="unpacks to more than 200 times its size"):
        documents(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
