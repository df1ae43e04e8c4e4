"""Find the vocabulary of a checkpoint by its number of lines; nothing else identifies it."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

from convert.inputs import visible
from gpt2ml_torch import foreign
from gpt2ml_torch.config import MAX_DIMENSION
from gpt2ml_torch.export.names import LINES_KEY
from gpt2ml_torch.export.tokenizer_json import vocab_text
from gpt2ml_torch.modelfile.format import count_lines
from gpt2ml_torch.options import OptionError
from gpt2ml_torch.tokenizer.vocabulary import check_tokens, split_lines
from gpt2ml_torch.valid_json import ContradictionError, unique

# Rows of the published 15G checkpoint, and lines of its vocabulary: two rows are reserved.
RESERVED_ROWS = (21_130, 21_128)
_KNOWN = {21_130: "bert-base-chinese, 21,128 lines", 8_021: "CLUE, 8,021 lines"}
_MAX_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The text of a vocabulary file, with notes for the user."""

    path: Path
    text: str
    notes: tuple[str, ...] = ()
    reserves: bool = False  # exported with its model, which may have rows without a token

    @property
    def lines(self) -> int:
        return count_lines(self.text)

    def fits(self, rows: int) -> bool:
        """Whether it may belong to a model whose embedding has `rows` rows."""
        if self.reserves:
            return self.lines <= rows
        return self.lines == rows or (rows, self.lines) == RESERVED_ROWS

    def fitted(self, rows: int) -> Vocabulary:
        """The vocabulary, without blank lines at its end if it fits only without them."""
        if self.fits(rows):
            return self
        note = f"blank lines at the end of {self.path} were left out"
        shorter = Vocabulary(self.path, self.text.rstrip("\r\n\t ") + "\n", (note,))
        return shorter if shorter.fits(rows) else self


def find_vocabulary(folder: Path, given: Path | None, rows: int) -> Vocabulary:
    """The vocabulary for `rows` rows: the given one, or the one in the folder that fits.

    A file that can't be read is ignored if another one fits. Raises `ValueError`, saying which
    vocabulary is needed, if none or several fit, and `OSError`.
    """
    if given is not None:
        candidates = [given]
    else:
        candidates = sorted(visible(folder, "*vocab*.txt"), key=lambda p: p.name != "vocab.txt")
    if not candidates and (folder / "tokenizer.json").is_file():
        candidates = [folder / "tokenizer.json"]
    if not candidates:
        raise OptionError(
            "no vocabulary (vocab.txt, *vocab*.txt) in {}; the checkpoint needs {}: put it there, "
            "give {vocab}, or convert without it by {with_vocab=False}",
            *(folder, needed(rows)),
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
        raise OptionError("several vocabularies fit: {}; choose one with {vocab}", found)
    return fitting[0]


def needed(rows: int) -> str:
    """The vocabulary that a checkpoint with `rows` rows needs, in words."""
    return _KNOWN.get(rows, f"one of {rows:,} lines")


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a vocabulary from vocab.txt or tokenizer.json.

    Raises `ValueError` for a file that is not a vocabulary (with the line of bytes that are not
    UTF-8), and `OSError`.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe might wait forever
            raise OSError(errno.EINVAL, "it is not a regular file")
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path} is too large for a vocabulary")
        foreign.check(path, wanted="vocabulary", text=True)
        if path.suffix == ".json":
            return _from_tokenizer_json(path)
        data = path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, f"can't read the vocabulary {path}: {error.strerror}") from None
    try:
        vocabulary = Vocabulary(path, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8; a vocabulary is a UTF-8 text file"
        ) from None
    try:
        check_tokens(split_lines(vocabulary.text))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return vocabulary


def _from_tokenizer_json(path: Path) -> Vocabulary:
    """The vocabulary in a tokenizer.json that this project exported.

    It is restored exactly if tokenizer_config.json is beside it.
    """
    content = _json_object(path)
    model = content.get("model")
    model = model if isinstance(model, dict) else {}
    vocab = model.get("vocab")
    if model.get("type") != "WordPiece" or not isinstance(vocab, dict) or not vocab:
        raise OptionError(
            "{} is a tokenizer of type {!r}; expected WordPiece with a vocabulary: either this "
            "model is not a GPT2_ML, or give its vocabulary as {vocab}",
            *(path, str(model.get("type"))[:40]),
        )
    _check_vocab(path, vocab)
    settings = path.with_name("tokenizer_config.json")
    lines = _json_object(settings).get(LINES_KEY) if settings.is_file() else None
    if lines is not None and not _are_lines(lines):
        raise ValueError(f"{settings}: {LINES_KEY} holds something other than numbered lines")
    try:
        text = vocab_text(vocab, lines)
        text.encode()
        check_tokens(split_lines(text))
    except ValueError as error:
        raise ValueError(f"{settings if lines else path}: {error}") from None
    return Vocabulary(path, text, _added(content, vocab), reserves=True)


def _check_vocab(path: Path, vocab: dict[str, Any]) -> None:
    """Raise `ValueError` for tokens and ids that can't be lines and line numbers."""
    if not all(type(id_) is int and 0 <= id_ < MAX_DIMENSION for id_ in vocab.values()):
        raise ValueError(f"{path} has ids that are not whole numbers from 0 to {MAX_DIMENSION - 1}")
    owners: dict[int, str] = {}
    for token, id_ in vocab.items():
        if owners.setdefault(id_, token) != token:
            names = f"{owners[id_][:40]!r} and {token[:40]!r}"
            raise ValueError(f"{path} gives the id {id_} to {names}; save the tokenizer again")
        if token != token.strip() or "\n" in token:
            raise ValueError(
                f"{path} has the token {token[:40]!r}, which can't be a line of a vocabulary; give "
                "the tokenizer that the model was exported with"
            )


def _added(content: dict[str, Any], vocab: dict[str, Any]) -> tuple[str, ...]:
    """A note on tokens that someone added to the tokenizer, if there are any."""
    entries = content.get("added_tokens")
    entries = entries if isinstance(entries, list) else []
    names = [entry.get("content") for entry in entries if isinstance(entry, dict)]
    added = [name for name in names if isinstance(name, str) and name not in vocab]
    if not added:
        return ()
    listed = ", ".join(repr(name[:40]) for name in added[:3]) + (", ..." if added[3:] else "")
    return (f"tokens added to the tokenizer are left out and become plain text: {listed}",)


def _are_lines(value: Any) -> bool:
    return isinstance(value, dict) and all(
        number.isascii() and number.isdigit() and len(number) < 10 and isinstance(line, str)
        for number, line in value.items()
    )


def _json_object(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} is too large for a tokenizer")
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except ContradictionError as error:
        raise OptionError(
            "{} contradicts itself: {}; save the tokenizer again or give {vocab}", path, error
        ) from None
    except (ValueError, RecursionError) as error:
        raise OptionError(
            "{} is not JSON ({}); fetch it again or give {vocab}", path, error
        ) from None
    if not isinstance(value, dict):
        raise OptionError("{} is not a JSON object; fetch it again or give {vocab}", path)
    return value
