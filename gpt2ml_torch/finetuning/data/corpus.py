"""Tokenised documents in memory-mapped files, and their split into training and validation."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

Indices = npt.NDArray[np.int64]

FORMAT = 3
META_FILE, IDS_FILE, DOCUMENTS_FILE = "meta.json", "ids.bin", "documents.bin"
UNLEARNED_FILE = "unlearned.bin"
DOCUMENT = np.dtype(
    [
        ("end", "<u8"),  # one past its last token
        ("hash", "<u8"),  # of its tokens
        ("prompt", "<u8"),  # tokens that are read but not learned
        ("characters", "<u8"),  # learned ones, white space left out
    ]
)
UNLEARNED = np.dtype([("start", "<u8"), ("stop", "<u8")])  # tokens, counted over all documents


class Corpus(Dataset[npt.NDArray[Any]]):
    """Documents as token ids, memory-mapped: `corpus[i]` holds the ids of the i-th document.

    `tokenize_files` makes a corpus. Documents are in the order of the files, each with its end
    token if there is one. Pickling a corpus stores only its path.

    Raises `OSError` if the folder can't be read, and `ValueError` if it is damaged or no corpus.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.meta = _read_meta(self.path)
        dtype = np.dtype(self.meta["dtype"])
        self.documents = _mapped(self.path / DOCUMENTS_FILE, DOCUMENT, self.meta["documents"])
        self.ids = _mapped(self.path / IDS_FILE, dtype, self.meta["tokens"])  # (tokens,)
        # Ranges after the prompts that are context and not targets, ascending.
        self.unlearned = _mapped(
            self.path / UNLEARNED_FILE, UNLEARNED, self.meta["unlearned_ranges"]
        )

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        index = range(len(self))[index]
        start = int(self.documents["end"][index - 1]) if index else 0
        return np.asarray(self.ids[start : int(self.documents["end"][index])])

    def __reduce__(self) -> tuple[type[Corpus], tuple[Path]]:
        return Corpus, (self.path,)

    @property
    def key(self) -> str:
        """A hash of the content: files, tokenizer and options."""
        return str(self.meta["key"])

    def starts(self) -> Indices:
        """The offset of each document in `ids`, (documents,)."""
        return np.concatenate([[0], self.documents["end"][:-1]]).astype(np.int64)

    def lengths(self) -> Indices:
        """The number of tokens of each document, (documents,)."""
        return self.documents["end"].astype(np.int64) - self.starts()

    def characters(self, documents: Indices | None = None) -> int:
        """The number of characters among the targets, without white space."""
        counts = self.documents["characters"]
        return int((counts if documents is None else counts[documents]).sum())

    def unlearned_within(self, start: int, stop: int) -> npt.NDArray[Any]:
        """The unlearned ranges that overlap tokens `start` to `stop`."""
        first = np.searchsorted(self.unlearned["stop"], start, side="right")
        last = np.searchsorted(self.unlearned["start"], stop, side="left")
        return self.unlearned[first:last]

    def unlearned_before(self, tokens: Indices) -> Indices:
        """The number of unlearned tokens before each of these offsets, (offsets,)."""
        if not len(self.unlearned):
            return np.zeros(len(tokens), dtype=np.int64)
        starts, stops = (self.unlearned[name].astype(np.int64) for name in ("start", "stop"))
        sums = np.concatenate([[0], np.cumsum(stops - starts)])
        ranges = np.searchsorted(starts, tokens, side="left")  # that begin before
        reaching_over = np.where(ranges > 0, np.maximum(stops[ranges - 1] - tokens, 0), 0)
        return np.asarray(sums[ranges] - reaching_over, dtype=np.int64)

    def duplicates(self) -> int:
        """The number of documents that repeat an earlier one."""
        return len(self) - len(np.unique(self.documents["hash"]))

    def split(self, fraction: float, *, seed: int = 0) -> tuple[Indices, Indices]:
        """Numbers of the documents for training and for validation, each ascending.

        The split depends on a hash of each document's tokens and the seed. Equal documents are
        always on the same side, and adding a document moves hardly any other.

        Raises `ValueError` for a fraction outside 0..1, and if the documents can't be divided.
        """
        if not 0 <= fraction < 1:
            raise ValueError(f"the validation fraction is {fraction}; expected 0 <= fraction < 1")
        everything = np.arange(len(self))
        if fraction == 0:
            return everything, everything[:0]
        values = _mixed(self.documents["hash"], seed)
        ordered = np.sort(values)
        wanted = min(max(round(fraction * len(self)), 1), len(self) - 1)
        chosen = values < ordered[wanted] if wanted else np.zeros(len(self), dtype=bool)
        if not chosen.any():  # the smallest value alone has more documents than were asked for
            chosen = values <= ordered[0]
        if chosen.all():
            raise ValueError(
                f"{len(self)} document(s), all alike, cannot be split into training and "
                "validation; give more documents (one a line with separator='line'), or "
                "validation files of their own (valid), or go without (valid_share 0)"
            )
        return everything[~chosen], everything[chosen]


def _mixed(hashes: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64, which spreads any change of seed over all bits."""
    offset = (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % (1 << 64)
    x = hashes + np.uint64(offset)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / META_FILE).read_text("utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError
        np.dtype(meta["dtype"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is not a token cache of this version; delete the folder, it will be rebuilt"
        ) from None
    return meta


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    found, expected = path.stat().st_size, count * dtype.itemsize
    if found != expected:
        raise ValueError(
            f"{path} has {found:,} bytes; expected {expected:,}: delete the folder, and it is "
            "made again"
        )
    if not count:  # nothing can be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))


def as_indices(documents: Sequence[int] | Indices | None, corpus: Corpus) -> Indices:
    """The document numbers, all of them for None. Raises `ValueError` for one out of range."""
    if documents is None:
        return np.arange(len(corpus))
    indices = np.asarray(documents, dtype=np.int64).reshape(-1)
    if len(indices) and (indices.min() < 0 or indices.max() >= len(corpus)):
        raise ValueError(
            f"documents are numbered {indices.min()} to {indices.max()}; "
            f"the corpus has numbers 0 to {len(corpus) - 1}"
        )
    return indices
