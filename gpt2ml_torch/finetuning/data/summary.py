"""Statistics and warnings about a corpus, shown before training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from gpt2ml_torch.finetuning.data.documents import PLAIN_TEXT
from gpt2ml_torch.finetuning.data.encoding import TextTokenizer
from gpt2ml_torch.finetuning.data.rows import RowDataset

UNKNOWN_SHARE_LIMIT = 0.01


class DecodingTokenizer(TextTokenizer, Protocol):
    """A tokenizer that also gives ids back as text."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts, lengths and one example of the training data. Lengths are in tokens."""

    files: int
    empty_files: int  # found in a folder and left out
    documents: int
    empty_texts: int  # JSON records left out because they hold nothing to learn
    shapes: dict[str, int]  # documents of all files by the JSON fields that they were read from
    duplicates: int  # in all files: documents that repeat an earlier one
    too_short: int  # documents left out
    cut_documents: int  # longer than a row
    tokens: int
    characters: int
    shortest: int
    median: float
    longest: int
    unknown_share: float  # share of [UNK] among all tokens of the files
    unknown_characters: tuple[
        str, ...
    ]  # outside the vocabulary, most frequent first, from a sample
    rows: int
    row_length: int
    fill: float  # share of the rows that is text and not padding
    targets: int  # tokens learned in one epoch
    example: str  # the first row's text as the model sees it, special tokens included
    example_learned: str  # the part that is learned, if there is a prompt; otherwise empty

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about what is probably unintended, one line each."""
        found = []
        if self.unknown_share > UNKNOWN_SHARE_LIMIT:
            some = " ".join(self.unknown_characters)
            found.append(
                f"{self.unknown_share:.1%} of the tokens are [UNK]"
                f"{f' (among them {some})' if some else ''}: perhaps the wrong vocabulary"
            )
        if self.too_short:
            found.append(
                f"{self.too_short:,} of {self.documents:,} documents are too short: left out"
            )
        if self.empty_files:
            found.append(f"{self.empty_files:,} empty file(s) left out")
        if self.empty_texts:
            found.append(f"{self.empty_texts:,} empty text(s) left out")
        if self.duplicates:
            found.append(f"{self.duplicates:,} documents repeat another one")
        return tuple(found)

    def __str__(self) -> str:
        """A few lines for people, warnings and example included."""
        lines = [
            f"{self.files:,} file(s), {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.characters:,} characters",
            *self._shapes(),
            f"tokens a document: {self.shortest:,} to {self.longest:,}, median {self.median:,.0f}; "
            f"{self.cut_documents:,} cut to fit",
            f"{self.rows:,} rows of {self.row_length:,} tokens, {self.fill:.0%} full; "
            f"{self.targets:,} tokens learned in an epoch; [UNK] {self.unknown_share:.2%}",
            *(f"warning: {warning}" for warning in self.warnings),
            f"example: {_shortened(self.example)}",
        ]
        if self.example_learned:
            lines.append(f"learned of it: {_shortened(self.example_learned)}")
        return "\n".join(lines)

    def _shapes(self) -> list[str]:
        """One line that says which fields were read, if there was a choice."""
        if set(self.shapes) <= {PLAIN_TEXT}:
            return []
        return ["read as: " + "; ".join(f"{n:,} of {shape}" for shape, n in self.shapes.items())]


def summarize(rows: RowDataset, tokenizer: DecodingTokenizer) -> Summary:
    """Describe the rows and the corpus behind them."""
    corpus, lengths = rows.corpus, rows.corpus.lengths()[rows.documents]
    first = rows[0]
    inside = first.document_ids == 1
    labels = first.labels[inside].tolist()
    # The row's last token is only a target, and so not in its input.
    example = [*first.token_ids[inside].tolist(), labels[-1]]
    learned = [] if labels[0] else [label for label in labels if label]
    meta = corpus.meta
    return Summary(
        files=meta["files"],
        empty_files=meta["empty_files"],
        empty_texts=meta["empty_texts"],
        shapes=meta["shapes"],
        documents=len(rows.documents),
        duplicates=corpus.duplicates(),
        too_short=rows.too_short,
        cut_documents=rows.cut_documents,
        tokens=int(lengths.sum()),
        characters=corpus.characters(rows.documents),
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        longest=int(lengths.max()),
        unknown_share=meta["unknown_tokens"] / meta["tokens"],
        unknown_characters=tuple(meta["unknown_characters"]),
        rows=len(rows),
        row_length=rows.length,
        fill=rows.fill,
        targets=rows.num_targets,
        example=tokenizer.decode(example, skip_special_tokens=False),
        example_learned=tokenizer.decode(learned, skip_special_tokens=False),
    )


def _shortened(text: str) -> str:
    """Both ends of a text that is too long to show; the end holds the end token."""
    return text if len(text) <= 200 else f"{text[:150]} … {text[-40:]}"
