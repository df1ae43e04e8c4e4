"""Tokenize files once, into a folder named after their content.

The folder is written under another name and then renamed, under a lock. If several processes start
together, one does the work and the others wait. What a killed process left is removed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpt2ml_torch import disk
from gpt2ml_torch.cache import cache_root
from gpt2ml_torch.finetuning.data.corpus import (
    DOCUMENT,
    DOCUMENTS_FILE,
    FORMAT,
    IDS_FILE,
    META_FILE,
    UNLEARNED,
    UNLEARNED_FILE,
    Corpus,
)
from gpt2ml_torch.finetuning.data.documents import DocumentReader, Piece, Separator
from gpt2ml_torch.finetuning.data.encoding import (
    EncodedPieces,
    TextTokenizer,
    encode_all,
    id_dtype,
)
from gpt2ml_torch.finetuning.data.files import Source, find_sources, regular_stat, shown
from gpt2ml_torch.finetuning.data.lines import complaint
from gpt2ml_torch.finetuning.data.records import Fields

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all

_WORTH_A_WORKER = 4 << 20  # bytes: below this, starting a process takes longer than its work
_HASH_BYTES = 1 << 20
_UNLEARNED_MARK = 1  # in a document's hash, after a piece inside it that is not learned


def tokenize_files(
    data: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    tokenizer: TextTokenizer,
    *,
    separator: Separator = "blank-line",
    fields: Fields | None = None,
    end_token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenize text and JSON files, or find their tokens in the cache.

    `data` is passed to `find_sources`. `separator` divides text files into documents, `fields`
    names the JSON fields to read if they would not be recognised, and `end_token` is a token such
    as "[SEP]" to append to each document. The cache is in `cache_dir`, by default
    `default_cache_dir()`; it may be deleted at any time. `workers` is the number of processes, by
    default one for each core if there is enough text. Files may be larger than the memory.

    Raises `ValueError` and `OSError` as `find_sources` and `DocumentReader.read` do, and for an end
    token that the vocabulary lacks, files without any document, files that change meanwhile, and a
    cache that cannot be written.
    """
    reader = DocumentReader(tokenizer.encode, separator=separator, fields=fields)
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; expected 0 or more")
    end_id = _end_id(tokenizer, end_token)
    sources = find_sources(data)
    states = [_state(source) for source in sources]
    digests = _digests(sources, sum(size for size, _ in states), progress)
    key = _key(sources, digests, tokenizer, reader, end_id)
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    build = _Build(sources, states, tokenizer, reader, end_id, workers, progress)
    with _cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{key}.lock"):
            return _open_cached(folder / key) or build.run(folder / key)


def default_cache_dir() -> Path:
    """The default folder for tokenised texts."""
    return cache_root() / "tokens"


# -- the key --------------------------------------------------------------------------------------


def _end_id(tokenizer: TextTokenizer, end_token: str | None) -> int | None:
    if end_token is None:
        return None
    found = tokenizer.token_to_id(end_token)
    if found is None or found == 0:  # id 0 is padding, which is never learned
        problem = "not in the vocabulary" if found is None else "padding"
        raise ValueError(f"the end token {end_token!r} is {problem}; expected one such as [SEP]")
    return found


def _state(source: Source) -> tuple[int, int]:
    found = regular_stat(source.path)
    return found.st_size, found.st_mtime_ns


def _digests(sources: Sequence[Source], total: int, progress: Progress | None) -> list[str]:
    """A hash of each file's content; hashing lets other threads run."""
    done = 0
    digests = []
    with ThreadPoolExecutor(_cores()) as pool:
        for source, digest in zip(sources, pool.map(_digest, sources), strict=True):
            digests.append(digest)
            if progress is not None:
                done += source.path.stat().st_size
                progress("hashing", min(done, total), total)
    return digests


def _digest(source: Source) -> str:
    digest = hashlib.blake2b(digest_size=20)
    try:
        with open(source.path, "rb") as file:
            while block := file.read(_HASH_BYTES):
                digest.update(block)
    except OSError as error:
        raise type(error)(f"cannot read {shown(source.path)}: {error.strerror}") from None
    return digest.hexdigest()


def _key(
    sources: Sequence[Source],
    digests: Sequence[str],
    tokenizer: TextTokenizer,
    reader: DocumentReader,
    end_id: int | None,
) -> str:
    parts = {
        "format": FORMAT,
        "files": [
            (s.kind, s.compression, digest) for s, digest in zip(sources, digests, strict=True)
        ],
        "vocab": hashlib.blake2b(tokenizer.vocab_text.encode("utf-8", "surrogatepass")).hexdigest(),
        "num_embeddings": tokenizer.num_embeddings,
        # The tokenizer classifies characters by the running Python's tables.
        "unicode": unicodedata.unidata_version,
        "separator": reader.separator,
        "fields": dataclasses.astuple(reader.fields),
        "end_id": end_id,
    }
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


# -- the folder -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    """Say in a system error that the cache could not be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            f"cannot write the token cache in {shown(folder)}: {error.strerror}; "
            "make room there, or choose another folder with cache_dir"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for the lock of that name; the system releases it when its holder dies."""
    held = disk.lock(path, busy=None)
    try:
        yield
    finally:
        disk.unlock(held)


def _open_cached(path: Path) -> Corpus | None:
    if not path.exists():
        return None
    try:
        return Corpus(path)
    except (ValueError, OSError) as error:
        logger.warning("the token cache is made again: %s", error)
        shutil.rmtree(path)
        return None


@dataclasses.dataclass
class _Build:
    """The task of tokenizing files into a folder."""

    sources: Sequence[Source]
    states: Sequence[tuple[int, int]]  # size and time of change, as they were hashed
    tokenizer: TextTokenizer
    reader: DocumentReader
    end_id: int | None
    workers: int | None
    progress: Progress | None
    empty_files: int = 0

    def run(self, path: Path) -> Corpus:
        partial = path.with_name(path.name + ".partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            self._write(partial, key=path.name)
            partial.rename(path)
            disk.sync_directory(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return Corpus(path)

    def _write(self, partial: Path, *, key: str) -> None:
        with (
            open(partial / IDS_FILE, "wb") as ids,
            open(partial / DOCUMENTS_FILE, "wb") as documents,
            open(partial / UNLEARNED_FILE, "wb") as unlearned,
        ):
            writer = _Writer(ids, documents, unlearned)
            encoded = encode_all(
                self.tokenizer, self._pieces(), end_id=self.end_id, workers=self._worker_count()
            )
            with contextlib.closing(encoded):
                for batch in encoded:
                    writer.add(batch)
            for file in (ids, documents, unlearned):
                file.flush()
                os.fsync(file.fileno())
        if not writer.tokens:
            raise ValueError(
                f"no text was found in {len(self.sources)} file(s), "
                f"{shown(self.sources[0].path)} first; expected documents"
            )
        meta = {
            "format": FORMAT,
            "key": key,
            "dtype": id_dtype(self.tokenizer.num_embeddings).str,
            "files": len(self.sources),
            "empty_files": self.empty_files,
            "separator": self.reader.separator,
            "empty_texts": self.reader.empty_texts,
            "shapes": dict(self.reader.shapes.most_common()),
            "end_id": self.end_id,
            **writer.totals(),
        }
        disk.write_synced(partial / META_FILE, json.dumps(meta, indent=1))

    def _pieces(self) -> Iterator[Piece]:
        total = sum(size for size, _ in self.states)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if self.progress is not None:
                self.progress("tokenizing", done, total)

        for source, state in zip(self.sources, self.states, strict=True):
            piece = None
            for piece in self.reader.read(source, progress=advance):
                yield piece
            if piece is None:
                self._count_empty(source)
            if _state(source) != state:
                raise OSError(f"{shown(source.path)} changed while it was read; start again")

    def _count_empty(self, source: Source) -> None:
        if source.named:
            raise complaint(source, 1, "the file is empty; expected documents")
        logger.warning("%s is empty and left out", shown(source.path))
        self.empty_files += 1

    def _worker_count(self) -> int:
        if self.workers is not None:
            return self.workers
        size = sum(size for size, _ in self.states)
        return min(_cores(), size // _WORTH_A_WORKER)


class _Writer:
    """Joins pieces into documents and writes the files of the corpus as they arrive."""

    def __init__(self, ids: BinaryIO, documents: BinaryIO, unlearned: BinaryIO) -> None:
        self._ids, self._documents, self._unlearned = ids, documents, unlearned
        self.tokens = self._count = self._unknown = self._characters = self._ranges = 0
        self._unknown_characters: collections.Counter[str] = collections.Counter()
        self._start_document()

    def _start_document(self) -> None:
        self._hashes: list[int] = []
        self._prompt = self._document_characters = 0
        self._in_prompt = True

    def add(self, batch: EncodedPieces) -> None:
        self._ids.write(batch.ids.tobytes())
        self._unknown += batch.unknown
        self._unknown_characters.update(batch.unknown_characters)
        records, ranges = [], []
        for length, characters, digest, learned, ends in zip(
            batch.lengths, batch.characters, batch.hashes, batch.learned, batch.ends, strict=True
        ):
            self._hashes.append(digest)
            if learned:
                self._document_characters += characters
                self._in_prompt = False
            elif self._in_prompt:
                self._prompt += length
            elif length:
                ranges.append((self.tokens, self.tokens + length))
                self._hashes.append(_UNLEARNED_MARK)
            self.tokens += length
            if ends:
                records.append(self._finish_document())
        self._ranges += len(ranges)
        self._documents.write(np.array(records, dtype=DOCUMENT).tobytes())
        self._unlearned.write(np.array(ranges, dtype=UNLEARNED).tobytes())

    def _finish_document(self) -> tuple[int, int, int, int]:
        parts = [*self._hashes, self._prompt]
        joined = b"".join(part.to_bytes(8, "little") for part in parts)
        digest = int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little")
        record = self.tokens, digest, self._prompt, self._document_characters
        self._count += 1
        self._characters += self._document_characters
        self._start_document()
        return record

    def totals(self) -> dict[str, Any]:
        return {
            "documents": self._count,
            "tokens": self.tokens,
            "unlearned_ranges": self._ranges,
            "characters": self._characters,
            "unknown_tokens": self._unknown,
            "unknown_characters": [c for c, _ in self._unknown_characters.most_common(20)],
        }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
