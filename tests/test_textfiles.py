"""Files that users name are read in bounded time and memory, or refused in one line."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from gpt2ml_torch.textfiles import read_text_file
from gpt2ml_torch.tokenizer import Tokenizer


def read(path: Path | str, **options: bool) -> str:
    return read_text_file(path, max_bytes=100, expected="a poem", **options)


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeff春\r\n\r眠".encode())
    assert read(file) == "\ufeff春\r\n\r眠"


def test_what_has_no_end_or_no_writer_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null", tmp_path):
        with pytest.raises(
            OSError,
            match=r"not a regular file; expected a poem|is a folder; expected a file: a poem",
        ):
            read(path)
        with pytest.raises(OSError, match=r"not a regular file|is a folder|holds neither"):
            Tokenizer.from_pretrained(path)
    assert read(tmp_path / "pipe", pipes=True) == ""


def test_a_pipe_with_a_writer_is_read_where_pipes_are_allowed() -> None:
    source, sink = os.pipe()

    def write() -> None:
        for part in ("春", "眠"):
            os.write(sink, part.encode())
        os.close(sink)

    writer = threading.Thread(target=write)
    writer.start()
    assert read(f"/dev/fd/{source}", pipes=True) == "春眠"
    writer.join()
    os.close(source)


def test_too_many_bytes_and_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"a" * 101)
    with pytest.raises(ValueError, match=r"a\.txt has more than 100 bytes.*expected a poem"):
        read(file)
    file.write_bytes(b"a\nb\n\xff")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8: byte 0xff in line 3; expected a p"):
        read(file)
