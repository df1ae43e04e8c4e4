"""The cache of tokens is keyed by content, written whole or not at all, and never in memory."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2ml_torch.finetuning.data import cache as cache_module
from gpt2ml_torch.finetuning.data import documents as documents_module
from gpt2ml_torch.finetuning.data import encoding as encoding_module
from gpt2ml_torch.finetuning.data.cache import default_cache_dir, tokenize_files
from gpt2ml_torch.finetuning.data.corpus import Corpus
from gpt2ml_torch.finetuning.data.documents import Piece
from gpt2ml_torch.finetuning.data.records import Fields
from gpt2ml_torch.tokenizer import Tokenizer
from tests.helpers.finetuning_data import (
    NumberTokenizer,
    numbered_corpus,
    small_tokenizer,
    write_jsonl,
)

TEXT = "春眠不觉晓\n\n处处闻啼鸟\n\n夜来风雨声 abs\n\n花落知多少,x\n"


class Counting:
    """A tokenizer that counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0
        self._tokenizer = small_tokenizer()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        return self._tokenizer.encode(text)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "poem.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_documents_are_the_tokenizers_ids_in_the_smallest_type(file: Path, tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    corpus = tokenize_files(file, tokenizer, cache_dir=tmp_path / "cache")
    texts = TEXT.split("\n\n")
    assert [corpus[i].tolist() for i in range(len(corpus))] == [*map(tokenizer.encode, texts)]
    assert corpus[-1].tolist() == corpus[3].tolist()
    assert corpus.lengths().tolist() == [len(tokenizer.encode(text)) for text in texts]
    assert corpus.ids.dtype == np.uint16
    assert corpus.characters() == sum(len("".join(text.split())) for text in texts)
    assert tokenize_files(file, NumberLike(), cache_dir=tmp_path / "cache").ids.dtype == np.uint32
    with pytest.raises(IndexError):
        corpus[4]


class NumberLike(NumberTokenizer):
    def encode(self, text: str) -> list[int]:
        return [70_000] * len(text)


def test_a_second_call_reads_the_same_arrays_without_tokenising(file: Path, tmp_path: Path) -> None:
    tokenizer = Counting()
    first = tokenize_files(file, tokenizer, cache_dir=tmp_path / "cache")
    calls = tokenizer.calls
    copy = file.with_name("other.txt")
    shutil.copy(file, copy)
    for again in (file, copy):  # keyed by content, whatever the name and the time
        second = tokenize_files(again, tokenizer, cache_dir=tmp_path / "cache")
        assert second.path == first.path
        np.testing.assert_array_equal(second.ids, first.ids)
        np.testing.assert_array_equal(second.documents, first.documents)
    assert tokenizer.calls == calls > 0


def test_another_content_tokenizer_or_option_makes_another_cache(
    file: Path, tmp_path: Path
) -> None:
    tokenizer = small_tokenizer()

    def key(data: Any = file, tokenizer: Any = tokenizer, **options: Any) -> str:
        return tokenize_files(data, tokenizer, cache_dir=tmp_path / "cache", **options).key

    other = file.with_name("b.txt")
    other.write_text("春", encoding="utf-8")
    keys = [key(), key(separator="line"), key(end_token="[SEP]"), key([file, other])]
    keys += [key([other, file]), key(tokenizer=Tokenizer(tokenizer.vocab_text + "眼\n"))]
    keys.append(key(tokenizer=Tokenizer(tokenizer.vocab_text, num_embeddings=99)))
    state = file.stat()
    file.write_text(TEXT.replace("春", "花"), encoding="utf-8")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # same size and time, other bytes
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key([file, file]) == keys[-1]  # a file named twice is read once


def test_another_python_with_other_character_tables_makes_another_cache(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tokenize_files(file, small_tokenizer(), cache_dir=tmp_path / "cache").key
    monkeypatch.setattr("unicodedata.unidata_version", "99.0.0")
    assert tokenize_files(file, small_tokenizer(), cache_dir=tmp_path / "cache").key != before


def test_other_fields_of_the_same_file_make_another_cache(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"a": "春眠", "b": "不觉", "c": "花"}])
    chosen = [Fields(text="a"), Fields(text="b"), Fields(prompt="a", completion="b")]
    chosen += [Fields(prompt="c", completion="b"), Fields(prompt="a", completion="c")]
    found = [
        tokenize_files(file, small_tokenizer(), fields=fields, cache_dir=tmp_path / "cache")
        for fields in chosen
    ]
    texts = [small_tokenizer().decode(corpus[0].tolist()) for corpus in found]
    assert texts == ["春眠", "不觉", "春眠不觉", "花不觉", "春眠花"]


def test_the_end_token_closes_each_document_once(tmp_path: Path) -> None:
    objects = [{"text": "春眠"}, {"prompt": "不", "completion": "觉晓"}]
    file = write_jsonl(tmp_path / "a.jsonl", objects)
    tokenizer = small_tokenizer()
    corpus = tokenize_files(file, tokenizer, end_token="[SEP]", cache_dir=tmp_path / "cache")
    expected = [[*tokenizer.encode("春眠"), 3], [*tokenizer.encode("不觉晓"), 3]]
    assert [document.tolist() for document in (corpus[0], corpus[1])] == expected
    assert corpus.documents["prompt"].tolist() == [0, 1]
    assert corpus.characters() == 4  # those that are learned


def test_worker_processes_give_the_same_as_one(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(encoding_module, "BATCH_CHARACTERS", 20)
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(f"春{'眠' * (i % 7)} ab{i}" for i in range(300)), encoding="utf-8")
    alone, shared = (
        tokenize_files(file, small_tokenizer(), cache_dir=tmp_path / str(workers), workers=workers)
        for workers in (1, 2)
    )
    assert len(shared) == 300
    assert shared.meta["unknown_tokens"] > 0
    assert shared.meta["unknown_characters"]
    for name in ("ids.bin", "documents.bin", "meta.json"):
        assert (alone.path / name).read_bytes() == (shared.path / name).read_bytes()


def test_a_worker_that_dies_or_a_tokenizer_that_cannot_travel_is_one_line(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text("import os; os._exit(9)")
    monkeypatch.setattr(encoding_module, "_WORKER", tmp_path / "worker.py")
    with pytest.raises(OSError, match=r"a tokenizing process ended with status 9.*workers=1"):
        tokenize_files(file, small_tokenizer(), cache_dir=tmp_path / "cache", workers=2)
    tokenizer = Counting()
    tokenizer.encode = lambda text: [1]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"cannot be sent to worker processes.*workers=1"):
        tokenize_files(file, tokenizer, cache_dir=tmp_path / "cache", workers=2)
    assert not list((tmp_path / "cache").iterdir())


KILLED = """
import os, signal, sys
from tests.helpers.finetuning_data import small_tokenizer
from gpt2ml_torch.finetuning.data.cache import tokenize_files
def progress(what, done, total):
    if what == "tokenizing" and done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
tokenize_files(sys.argv[1], small_tokenizer(), cache_dir=sys.argv[2], progress=progress)
"""


def test_what_a_killed_run_leaves_is_neither_found_nor_kept(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.txt", tmp_path / "cache"
    file.write_text("春眠不觉晓\n\n" * 20_000, encoding="utf-8")
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", KILLED, str(file), str(folder)]
    done = subprocess.run(command, cwd=root, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in folder.iterdir() if path.is_dir()]
    assert [name.endswith(".partial") for name in left] == [True]
    corpus = tokenize_files(file, small_tokenizer(), cache_dir=folder)
    assert len(corpus) == 20_000
    assert [path.name for path in folder.iterdir()] == [corpus.path.name]


def test_a_failed_run_leaves_nothing(file: Path, tmp_path: Path) -> None:
    class Failing(Counting):
        def encode(self, text: str) -> list[int]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_files(file, Failing(), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_damaged_cache_is_made_again_with_a_word_in_the_log(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = tokenize_files(file, small_tokenizer(), cache_dir=tmp_path / "cache")
    for name, data in (("ids.bin", b"123"), ("meta.json", b"{}"), ("documents.bin", b"")):
        expected = (first.path / name).read_bytes()
        (first.path / name).write_bytes(data)
        with pytest.raises(ValueError, match="delete the folder"):
            Corpus(first.path)
        tokenize_files(file, small_tokenizer(), cache_dir=tmp_path / "cache")
        assert (first.path / name).read_bytes() == expected
    assert caplog.text.count("the token cache is made again") == 3


def test_of_runs_that_start_together_one_works(file: Path, tmp_path: Path) -> None:
    tokenizer = Counting()
    alone = Counting()
    tokenize_files(file, alone, cache_dir=tmp_path / "alone")
    found: list[Corpus] = []

    def run() -> None:
        found.append(tokenize_files(file, tokenizer, cache_dir=tmp_path / "cache"))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({corpus.path for corpus in found}) == 1
    assert len(found) == 8
    assert tokenizer.calls == alone.calls


def test_a_file_that_changes_while_it_is_read_is_an_error(file: Path, tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if what == "tokenizing":
            file.write_text("春", encoding="utf-8")

    with pytest.raises(OSError, match=r"poem\.txt changed while it was read"):
        tokenize_files(file, small_tokenizer(), cache_dir=tmp_path / "cache", progress=progress)


def test_a_cache_that_cannot_be_written_is_one_line(file: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write the token cache in .*poem\.txt/cache: Not"):
        tokenize_files(file, small_tokenizer(), cache_dir=file / "cache")
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left on device; make room there"):
            _build_on_full_disk(file, tmp_path)


def _build_on_full_disk(file: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "IDS_FILE", "/dev/full")
        tokenize_files(file, small_tokenizer(), cache_dir=tmp_path / "cache")


class Fast(NumberTokenizer):
    """One id a character, at no cost: what remains is the pipeline."""

    num_embeddings = 100

    def encode(self, text: str) -> list[int]:
        return [7] * len(text)


@pytest.mark.parametrize("separator", ["blank-line", "file"])
def test_memory_does_not_grow_with_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: Any
) -> None:
    monkeypatch.setattr(encoding_module, "BATCH_CHARACTERS", 1 << 15)
    monkeypatch.setattr(documents_module, "PIECE_CHARACTERS", 1 << 15)
    peaks = []
    for megabytes in (1, 8):
        file = tmp_path / f"{megabytes}.txt"
        file.write_bytes((b"x" * 1022 + b"\n\n") * 1024 * megabytes)
        gc.collect()
        tracemalloc.start()
        corpus = tokenize_files(
            file, Fast(), separator=separator, cache_dir=tmp_path / "cache", workers=1
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(corpus.ids) > 1000 * 1024 * megabytes
    assert peaks[1] < 1.1 * peaks[0] + (1 << 18), peaks


def test_progress_is_told_and_nothing_is_printed(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, int, int]] = []
    with caplog.at_level(logging.INFO):
        tokenize_files(
            file,
            small_tokenizer(),
            cache_dir=tmp_path / "cache",
            progress=lambda *event: told.append(event),
        )
    size = file.stat().st_size
    assert [event for event in told if event[1] == size] == [
        ("hashing", size, size),
        ("tokenizing", size, size),
    ]
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_corpus_travels_as_its_path(tmp_path: Path) -> None:
    corpus = numbered_corpus(tmp_path, [5000])
    sent = pickle.dumps(corpus)
    assert len(sent) < 500
    np.testing.assert_array_equal(pickle.loads(sent)[0], corpus[0])


def test_the_split_is_fixed_by_the_seed_and_keeps_equal_documents_together(tmp_path: Path) -> None:
    objects = [{"text": str(10 + index % 150)} for index in range(200)]
    file = write_jsonl(tmp_path / "a.jsonl", objects)
    corpus = tokenize_files(file, NumberTokenizer(), cache_dir=tmp_path / "cache")
    train, valid = corpus.split(0.1, seed=1)
    assert sorted([*train, *valid]) == list(range(200))
    assert 10 <= len(valid) <= 20
    sides = [{int(corpus[i][0]) for i in side} for side in (train, valid)]
    assert not sides[0] & sides[1]
    assert corpus.split(0.1, seed=1)[1].tolist() == valid.tolist()
    assert corpus.split(0.1, seed=2)[1].tolist() != valid.tolist()
    assert len(corpus.split(0)[1]) == 0
    assert corpus.duplicates() == 50


def test_a_document_added_later_hardly_moves_the_split(tmp_path: Path) -> None:
    splits = []
    for count in (200, 201):
        objects = [{"text": str(10 + index)} for index in range(count)]
        file = write_jsonl(tmp_path / "a.jsonl", objects)
        corpus = tokenize_files(file, NumberTokenizer(), cache_dir=tmp_path / "cache")
        splits.append(set(corpus.split(0.1)[1].tolist()))
    assert len(splits[0] ^ splits[1]) <= 2


def test_what_cannot_be_split_is_one_line(tmp_path: Path) -> None:
    corpus = numbered_corpus(tmp_path, [5])
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="expected 0 <= fraction < 1"):
            corpus.split(fraction)
    with pytest.raises(ValueError, match=r"1 document\(s\), all alike, cannot be split"):
        corpus.split(0.5)


def test_the_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPT2ML_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path / "tokens"


def test_a_worker_loads_no_torch_but_may_be_given_a_class_that_needs_the_package(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reporting(Tokenizer):
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, ("import sys; sys.exit(7 if 'torch' in sys.modules else 8)",)

    tokenizer = Reporting(small_tokenizer().vocab_text)
    with pytest.raises(OSError, match="ended with status 8"):
        tokenize_files(file, tokenizer, cache_dir=tmp_path / "cache", workers=2)

    (tmp_path / "their_tokenizer.py").write_text(
        "from gpt2ml_torch import GPT2ML\n"
        "from gpt2ml_torch.tokenizer import Tokenizer\n"
        "class Theirs(Tokenizer): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module("their_tokenizer").Theirs(tokenizer.vocab_text)
    worker = encoding_module._Worker(theirs, None)
    try:
        assert worker.encode([Piece("春眠不觉晓")]).ids.tolist() == tokenizer.encode("春眠不觉晓")
    finally:
        worker.stop()
