"""Documents as rows of equal length: one document a row, as in the original training, or packed.

Every token except the first of a document is a target exactly once. A long document is cut into
overlapping windows; the tokens that a window repeats serve as context and are not targets again.

Shapes:
    B  batch rows       T  tokens in a row
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gpt2ml_torch.finetuning.data.corpus import Corpus, Indices, as_indices

PAD_ID = 0  # a target of 0 is ignored, as in the original


class Rows(NamedTuple):
    """The input of one step: each (B, T) int64, or (T,) for a single row."""

    token_ids: Tensor  # padded with 0 on the right
    labels: Tensor  # the next token; 0 where nothing is learned
    positions: Tensor  # 0, 1, ... in each document
    document_ids: Tensor  # 1, 2, ... for the documents of a row, 0 for padding

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Rows:
        """The same rows on another device."""
        return Rows(*(field.to(device, non_blocking=non_blocking) for field in self))


def next_token_rows(token_ids: Tensor) -> Rows:
    """Make rows for next-token prediction from token ids, (B, T + 1) int64 padded with 0.

    Set `labels` to 0 at positions that should not contribute to the loss.
    """
    inputs, labels = token_ids[..., :-1].clone(), token_ids[..., 1:].clone()
    positions = torch.arange(inputs.shape[-1], device=inputs.device).expand(inputs.shape)
    return Rows(inputs, labels, positions, (inputs != PAD_ID).long())


def collate(rows: Sequence[Rows], *, multiple_of: int | None = None) -> Rows:
    """Stack rows into a batch, (T,) each -> (B, T).

    With `multiple_of`, columns that hold only padding are cut off, down to a multiple of that
    length. The loss is the same, and no time is spent on padding.
    """
    batch = Rows(*(torch.stack(field) for field in zip(*rows, strict=True)))  # (B, T)
    if multiple_of is None:
        return batch
    used = int((batch.document_ids != 0).sum(-1).max())
    length = min(max(-(-used // multiple_of), 1) * multiple_of, batch.token_ids.shape[-1])
    return Rows(*(field[:, :length].contiguous() for field in batch))


class RowDataset(Dataset[Rows]):
    """Documents of a corpus as rows of `length` tokens: `rows[i]` is a `Rows` of shape (T,).

    A document of n tokens has n - 1 targets. If these exceed `length`, the document is cut into
    windows that share `overlap` tokens (by default an eighth of the length), and each target counts
    in the first window that contains it. Documents of at most `min_tokens` tokens (64 in the
    original training) or without a target are skipped and counted in `too_short`. With `pack`, a
    row holds several documents, told apart by `document_ids`; documents that fit into a row are
    never cut. Prompts are context, only what follows them is a target.

    Raises `ValueError` for impossible sizes, and if no document is left.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        documents: Sequence[int] | Indices | None = None,
        length: int = 1024,
        overlap: int | None = None,
        min_tokens: int = 0,
        pack: bool = False,
    ) -> None:
        overlap = length // 8 if overlap is None else overlap
        _check_sizes(length, overlap, min_tokens)
        self.corpus, self.length, self.overlap, self.packed = corpus, length, overlap, pack
        self.min_tokens = min_tokens
        self.documents = as_indices(documents, corpus)
        lengths = corpus.lengths()[self.documents]
        prompts = corpus.documents["prompt"][self.documents].astype(np.int64)
        # The first token is never a target, and the last is never an input.
        usable = (lengths > max(min_tokens, 1)) & (prompts < lengths)
        self.too_short = int(np.count_nonzero(~usable))
        if not usable.any():
            raise ValueError(
                f"none of {len(lengths)} document(s) is long enough to learn from; expected more "
                f"than {max(min_tokens, 1)} tokens: lower min_tokens or join the texts"
            )
        starts = corpus.starts()[self.documents]
        windows = _cut(
            starts[usable], lengths[usable], prompts[usable], length, overlap, shift_last=not pack
        )
        windows = windows[self._targets_of(windows) > 0]
        self.cut_documents = int(np.count_nonzero(lengths[usable] - 1 > length))
        self._windows = windows  # columns: first token, tokens, first learned token
        self._bounds = _pack(windows[:, 1] - 1, length) if pack else None

    def __len__(self) -> int:
        return len(self._windows) if self._bounds is None else len(self._bounds.rows) - 1

    def __getitem__(self, index: int) -> Rows:
        index = range(len(self))[index]
        token_ids, labels, document_ids = np.zeros((3, self.length), dtype=np.int64)
        positions = np.arange(self.length)
        at = 0
        for number, window in enumerate(self._windows_of(index), start=1):
            start, size, learned = (int(value) for value in window)
            tokens = self.corpus.ids[start : start + size]
            stop = at + size - 1
            token_ids[at:stop] = tokens[:-1]
            labels[at + learned - 1 : stop] = tokens[learned:]
            for part in self.corpus.unlearned_within(start + learned, start + size):
                first, last = (at - 1 + int(part[name]) - start for name in ("start", "stop"))
                labels[max(first, at) : min(last, stop)] = PAD_ID
            document_ids[at:stop] = number
            positions[at:] = np.arange(self.length - at)
            at = stop
        if at < self.length and self.packed:
            positions[at:] = np.arange(self.length - at)
        return Rows(*map(torch.from_numpy, (token_ids, labels, positions, document_ids)))

    def _windows_of(self, index: int) -> npt.NDArray[np.int64]:
        if self._bounds is None:
            return self._windows[index : index + 1]
        order = self._bounds.order[self._bounds.rows[index] : self._bounds.rows[index + 1]]
        return self._windows[order]

    def fingerprint(self) -> str:
        """A hash of what decides the rows: the corpus, the chosen documents and the sizes."""
        digest = hashlib.blake2b(digest_size=16)
        sizes = self.length, self.overlap, self.min_tokens, self.packed
        digest.update(repr((self.corpus.key, sizes)).encode())
        digest.update(self.documents.tobytes())
        return digest.hexdigest()

    @property
    def num_targets(self) -> int:
        """The number of targets in one epoch."""
        return int(self._targets_of(self._windows).sum())

    def _targets_of(self, windows: npt.NDArray[np.int64]) -> Indices:
        """The number of targets of each window, (windows,)."""
        start, size, learned = windows.T
        before_first, before_end = (
            self.corpus.unlearned_before(start + place) for place in (learned, size)
        )
        return size - learned - (before_end - before_first)

    @property
    def fill(self) -> float:
        """The share of positions that hold a token rather than padding."""
        return float((self._windows[:, 1] - 1).sum()) / (len(self) * self.length)

    def learned_characters(self) -> int:
        """The number of characters among the targets, for bits per character."""
        lengths = self.corpus.lengths()[self.documents]
        prompts = self.corpus.documents["prompt"][self.documents].astype(np.int64)
        usable = (lengths > max(self.min_tokens, 1)) & (prompts < lengths)
        return self.corpus.characters(self.documents[usable])


def _check_sizes(length: int, overlap: int, min_tokens: int) -> None:
    if length < 1:
        raise ValueError(f"the row length is {length}; expected at least 1 token")
    if not 0 <= overlap < length:
        raise ValueError(
            f"the overlap is {overlap}; expected 0 <= overlap < {length}, the row length"
        )
    if min_tokens < 0:
        raise ValueError(f"min_tokens is {min_tokens}; expected 0 or more")


def _cut(
    starts: Indices,
    lengths: Indices,
    prompts: Indices,
    row_length: int,
    overlap: int,
    *,
    shift_last: bool,
) -> npt.NDArray[np.int64]:
    """First token, number of tokens and first learned token (counted in the window), (windows, 3).

    With `shift_last`, the last window starts early enough to be full: it has more context instead
    of padding.
    """
    stride = row_length - overlap
    targets = lengths - 1
    counts = 1 + np.maximum(0, -(-(targets - row_length) // stride))  # windows of each document
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = number * stride
    learned = np.where(number == 0, 1, begin + overlap + 1)
    if shift_last:
        is_last = (number == counts[document] - 1) & (number > 0)
        begin = np.where(is_last, targets[document] - row_length, begin)
    stop = np.minimum(begin + row_length + 1, lengths[document])
    learned = np.maximum(learned, prompts[document])
    kept = learned < stop  # a window of a long prompt has nothing to learn
    columns = (starts[document] + begin, stop - begin, learned - begin)
    return np.stack(columns, axis=1)[kept].astype(np.int64)


class _Bounds(NamedTuple):
    """Which windows make up each row: `order[rows[i]:rows[i + 1]]`."""

    order: Indices
    rows: Indices


def _pack(sizes: Indices, row_length: int) -> _Bounds:
    """Pack windows into rows by best-fit decreasing, in about a microsecond a window.

    Rows with the same room left share a list. The bits of one integer tell which lists are not
    empty: the tightest fit is its lowest set bit at or above the size.
    """
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms, num_rows = 0, 0
    order = np.argsort(-sizes, kind="stable")
    row_of: list[int] = []
    for size in sizes[order].tolist():
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
        else:
            row, room = num_rows, row_length
            num_rows += 1
        row_of.append(row)
        if room - size:
            open_rows[room - size].append(row)
            rooms |= 1 << (room - size)
    rows = np.asarray(row_of, dtype=np.int64)
    # Stable: the windows of a row stay in order, longest first.
    by_row: npt.NDArray[Any] = np.argsort(rows, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))])
    return _Bounds(order[by_row], bounds)
