"""Split text into words, as BERT does before it consults the vocabulary.

This is written with `unicodedata` because the `tokenizers` library differs from the original for
138,283 characters (private use, newer Unicode tables, part of a CJK block) and for the final sigma.
A table from each character to its lower-cased form without accents is also faster.

Source: google-research/bert, tokenization.py, BasicTokenizer, as vendored by imcaspar/gpt2-ml.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from itertools import groupby

# First and last character of each block that the original treats as Chinese. Later extensions (from
# G on, U+30000 and above) are not included.
CJK_BLOCKS = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


def is_cjk(character: str) -> bool:
    """Whether the original treats the character as Chinese, that is, as a word of its own."""
    return character != "" and any(low <= ord(character) <= high for low, high in CJK_BLOCKS)


def is_punctuation(character: str) -> bool:
    """Whether the character is split off as punctuation, as all ASCII symbols are, even "$"."""
    if character.isascii():
        return character.isprintable() and not character.isalnum() and character != " "
    return unicodedata.category(character).startswith("P")


def _clean(character: str) -> str:
    """Drop control characters and put spaces around Chinese ones; keep white space."""
    if character in "\t\n\r":
        return " "
    if character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cf"):
        return ""
    return f" {character} " if is_cjk(character) else character


def _decompose(character: str) -> str:
    return unicodedata.normalize("NFD", character)


def _strip_and_split(character: str) -> str:
    """Drop accents and put spaces around punctuation."""
    if unicodedata.category(character) == "Mn":
        return ""
    return f" {character} " if is_punctuation(character) else character


def _normalize_alone(character: str) -> str:
    return "".join(map(_strip_and_split, _decompose(_clean(character).lower())))


def _holds_moving_mark(character: str) -> bool:
    """Whether the character holds a combining mark that is kept and that canonical ordering may
    move: a dozen marks of musical notation and Hangul tones."""
    marks = (c for c in _decompose(character) if unicodedata.category(c) != "Mn")
    return any(map(unicodedata.combining, marks))


class _CharacterMap(dict[int, str]):
    """A table for `str.translate` whose entries are computed on first use."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, code: int) -> str:
        self[code] = form = self._rule(chr(code))
        return form


class WordSplitter:
    """Splits a text into lower-case words without accents, in time linear in its length."""

    def __init__(self) -> None:
        self._moving_marks: set[str] = set()  # seen so far
        self._alone = _CharacterMap(self._form)
        self._cleaned = _CharacterMap(_clean)
        self._decomposed = _CharacterMap(_decompose)
        self._split = _CharacterMap(_strip_and_split)

    def words(self, text: str) -> list[str]:
        """Return the words; each Chinese character and punctuation mark is a word of its own."""
        if "Σ" in text:  # the only character whose lower case depends on its neighbours
            text = text.translate(self._cleaned).lower()
        spaced = text.translate(self._alone)
        if self._moving_marks and not self._moving_marks.isdisjoint(text):
            spaced = self._in_canonical_order(text)
        return spaced.split()

    def _form(self, character: str) -> str:
        if _holds_moving_mark(character):
            self._moving_marks.add(character)
        return _normalize_alone(character)

    def _in_canonical_order(self, text: str) -> str:
        decomposed = text.translate(self._cleaned).lower().translate(self._decomposed)
        # Sorted here, since `unicodedata.normalize` sorts long runs of marks in quadratic time.
        ordered: list[str] = []
        for _, run in groupby(decomposed, lambda c: unicodedata.combining(c) > 0):
            ordered += sorted(run, key=unicodedata.combining)  # stable: starters keep their order
        return "".join(ordered).translate(self._split)
