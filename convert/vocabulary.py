"""Finding the vocabulary that belongs to a checkpoint: by the number of its lines, since nothing
else tells them apart."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

from convert import foreign
from convert.inputs import visible
from gpt2ml_torch.modelfile.format import count_lines

# Rows of the published 15G checkpoint, and lines of its vocabulary: two rows are reserved.
RESERVED_ROWS = (21_130, 21_128)
_KNOWN = {21_130: "bert-base-chinese, 21,128 lines", 8_021: "CLUE, 8,021 lines"}
_MAX_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A vocabulary file's text, and what there is to tell about it."""

    path: Path
    text: str
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> int:
        return count_lines(self.text)

    def fits(self, rows: int) -> bool:
        """Whether it may belong to a model with so many rows of the embedding."""
        return self.lines == rows or (rows, self.lines) == RESERVED_ROWS

    def fitted(self, rows: int) -> Vocabulary:
        """The vocabulary itself, or without blank lines at its end where it fits only so."""
        if self.fits(rows):
            return self
        note = f"blank lines at the end of {self.path} were left out"
        shorter = Vocabulary(self.path, self.text.rstrip("\r\n\t ") + "\n", (note,))
        return shorter if shorter.fits(rows) else self


def find_vocabulary(folder: Path, given: Path | None, rows: int) -> Vocabulary:
    """The vocabulary of a model with so many rows: the one given, else the one in the folder that
    fits. One that can't be read does no harm beside one that fits.

    Raises `ValueError` where none fits, or more than one, saying which is needed; and `OSError`.
    """
    if given is not None:
        candidates = [given]
    else:
        candidates = sorted(visible(folder, "*vocab*.txt"), key=lambda p: p.name != "vocab.txt")
    if not candidates:
        raise ValueError(
            f"no vocabulary (vocab.txt, *vocab*.txt) in {folder}; the checkpoint needs "
            f"{needed(rows)}: put it there, give --vocab, or go without by --no-vocab"
        )
    vocabularies, errors = [], []
    for path in candidates:
        try:
            vocabularies.append(read_vocabulary(path).fitted(rows))
        except (ValueError, OSError) as error:
            errors.append(error)
    fitting = [vocabulary for vocabulary in vocabularies if vocabulary.fits(rows)]
    if not fitting and errors:
        raise errors[0]
    if not fitting:
        found = ", ".join(
            f"{vocabulary.path} has {vocabulary.lines}" for vocabulary in vocabularies
        )
        raise ValueError(f"wrong vocabulary: {found} lines; the checkpoint needs {needed(rows)}")
    if len({vocabulary.text for vocabulary in fitting}) > 1 and fitting[0].path.name != "vocab.txt":
        found = ", ".join(vocabulary.path.name for vocabulary in fitting)
        raise ValueError(f"several vocabularies fit: {found}; choose one with --vocab")
    return fitting[0]


def needed(rows: int) -> str:
    """The vocabulary that a checkpoint of so many rows needs, in words."""
    return _KNOWN.get(rows, f"one of {rows:,} lines")


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a vocabulary; `ValueError` with the line for bytes that are not UTF-8, and `OSError`."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError(errno.EINVAL, "it is no file")
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path} is too large for a vocabulary")
        foreign.check(path)
        data = path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, f"can't read the vocabulary {path}: {error.strerror}") from None
    try:
        return Vocabulary(path, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8; a vocabulary is a UTF-8 text file"
        ) from None
