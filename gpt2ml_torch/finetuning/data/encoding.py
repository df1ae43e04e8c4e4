"""Tokenize pieces of text, in this process or in workers.

The tokenizer is written in Python, so threads would serialise on the interpreter lock. The workers
are plain subprocesses that communicate through pipes. `multiprocessing` would import the caller's
main script again, which then needs a guard, and forking a process with torch's threads is unsafe. A
worker ends when its parent dies, because its input is closed.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gpt2ml_torch.finetuning.data.documents import Piece

BATCH_CHARACTERS = 1 << 18
_BATCH_PIECES = 1 << 14
_SAMPLED_CHARACTERS = 1 << 13  # of each batch, searched for characters outside the vocabulary
_WORKER = Path(__file__).with_name("worker.py")


class TextTokenizer(Protocol):
    """The part of `gpt2ml_torch.Tokenizer` that tokenizing files uses."""

    def encode(self, text: str) -> list[int]: ...

    def token_to_id(self, token: str) -> int | None: ...

    @property
    def vocab_text(self) -> str: ...

    @property
    def num_embeddings(self) -> int: ...

    @property
    def unk_id(self) -> int: ...


class EncodedPieces(NamedTuple):
    """The tokens of several pieces, concatenated, and facts about each piece."""

    ids: npt.NDArray[np.unsignedinteger[Any]]  # (tokens,)
    lengths: list[int]  # tokens of each piece, an end token included
    characters: list[int]  # of each piece, white space left out
    hashes: list[int]  # 64 bits of its tokens
    learned: list[bool]
    ends: list[bool]
    unknown: int  # number of [UNK] tokens
    unknown_characters: dict[str, int]  # counted in a sample


def encode_pieces(
    tokenizer: TextTokenizer, pieces: Sequence[Piece], *, end_id: int | None = None
) -> EncodedPieces:
    """Tokenize pieces; `end_id` is appended to each that ends a document."""
    joined: list[int] = []
    lengths, characters = [], []
    for piece in pieces:
        before = len(joined)
        joined += tokenizer.encode(piece.text)
        if piece.ends and end_id is not None:
            joined.append(end_id)
        lengths.append(len(joined) - before)
        characters.append(len("".join(piece.text.split())))
    ids = np.array(joined, dtype=id_dtype(tokenizer.num_embeddings))
    unknown = int(np.count_nonzero(ids == tokenizer.unk_id))
    return EncodedPieces(
        ids=ids,
        lengths=lengths,
        characters=characters,
        hashes=_hashes(ids, lengths),
        learned=[piece.learned for piece in pieces],
        ends=[piece.ends for piece in pieces],
        unknown=unknown,
        unknown_characters=_unknown_characters(tokenizer, pieces) if unknown else {},
    )


def id_dtype(num_embeddings: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest of uint16 and uint32 that holds every id, little-endian."""
    return np.dtype("<u2" if num_embeddings <= 1 << 16 else "<u4")


def _hashes(ids: npt.NDArray[Any], lengths: Iterable[int]) -> list[int]:
    data, size, start, hashes = memoryview(ids.tobytes()), ids.itemsize, 0, []
    for length in lengths:
        stop = start + length * size
        digest = hashlib.blake2b(data[start:stop], digest_size=8).digest()
        hashes.append(int.from_bytes(digest, "little"))
        start = stop
    return hashes


def _unknown_characters(tokenizer: TextTokenizer, pieces: Iterable[Piece]) -> dict[str, int]:
    sample, size = [], 0
    for piece in pieces:
        sample.append(piece.text[: _SAMPLED_CHARACTERS - size])
        size += len(sample[-1])
        if size >= _SAMPLED_CHARACTERS:
            break
    counted = collections.Counter("".join(sample))
    return {c: n for c, n in counted.items() if tokenizer.encode(c) == [tokenizer.unk_id]}


# -- in parallel ----------------------------------------------------------------------------------


def batches_of(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group pieces into batches large enough to be worth sending to another process."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(
    tokenizer: TextTokenizer, pieces: Iterable[Piece], *, end_id: int | None, workers: int
) -> Generator[EncodedPieces, None, None]:
    """Tokenize all pieces in order, with at most a few batches a worker in memory.

    With `workers` 0 or 1 this process does the work. Raises `ValueError` if the tokenizer can't be
    pickled, and `OSError` if a worker can't be started or dies.
    """
    batches = batches_of(pieces)
    if workers <= 1:
        for batch in batches:
            yield encode_pieces(tokenizer, batch, end_id=end_id)
        return
    with contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            worker = _Worker(tokenizer, end_id)
            stack.callback(worker.stop)
            idle.put(worker)

        def encode(batch: list[Piece]) -> EncodedPieces:
            worker = idle.get()
            try:
                return worker.encode(batch)
            finally:
                idle.put(worker)

        pool = stack.enter_context(ThreadPoolExecutor(workers))
        waiting: collections.deque[Future[EncodedPieces]] = collections.deque()
        stack.callback(lambda: [future.cancel() for future in waiting])
        for batch in batches:
            waiting.append(pool.submit(encode, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Worker:
    """One subprocess that tokenizes."""

    def __init__(self, tokenizer: TextTokenizer, end_id: int | None) -> None:
        try:
            packed = pickle.dumps(tokenizer)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the tokenizer cannot be sent to worker processes ({error}); use workers=1"
            ) from None
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # The parent reports a worker that dies; a traceback after Ctrl-C would be noise.
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # `encode` reports it
            pickle.dump((sys.path, packed, end_id), self._input)
            self._input.flush()

    def encode(self, batch: list[Piece]) -> EncodedPieces:
        try:
            pickle.dump(batch, self._input, pickle.HIGHEST_PROTOCOL)
            self._input.flush()
            answer = pickle.load(self._output)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            raise OSError(
                f"a tokenizing process ended with status {self._process.wait()} (out of memory?); "
                "use workers=1, which starts no other process"
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def stop(self) -> None:
        self._process.kill()
        for pipe in (self._input, self._output):
            with contextlib.suppress(OSError):  # data that it never read
                pipe.close()
        self._process.wait()
