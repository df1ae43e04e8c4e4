"""Words to ids: WordPiece's greedy longest match.

Source: google-research/bert, tokenization.py, WordpieceTokenizer, as vendored by imcaspar/gpt2-ml.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MAX_WORD_CHARACTERS = 200  # a longer word is one [UNK]
# Longer tokens are found by a prefix of this many characters and by their lengths. With a table of
# all prefixes, one token of 200,000 characters would take gigabytes.
_MAX_PREFIX = 32


class WordPiece:
    """Splits words into tokens of a vocabulary.

    `ids` maps each token to its id; tokens that continue a word begin with "##".
    """

    def __init__(self, ids: Mapping[str, int], *, unk_id: int) -> None:
        self._unk_id = unk_id
        self._starts = _Pieces(ids.items())
        self._continuations = _Pieces(
            (token[2:], id_) for token, id_ in ids.items() if token.startswith("##")
        )

    def split(self, word: str) -> list[int]:
        """The ids of a word, the longest possible token first; [UNK] if any part has none."""
        if len(word) > _MAX_PREFIX:
            return self._split_long(word)
        ids, start, table = [], 0, self._starts.table
        while start < len(word):
            longest, stop = -1, start
            for end in range(start + 1, len(word) + 1):
                id_ = table.get(word[start:end])
                if id_ is None:
                    break
                if id_ >= 0:
                    longest, stop = id_, end
            if longest < 0:
                return [self._unk_id]
            ids.append(longest)
            start, table = stop, self._continuations.table
        return ids

    def _split_long(self, word: str) -> list[int]:
        """As `split`, for words in which tokens of more than `_MAX_PREFIX` characters may occur."""
        if len(word) > MAX_WORD_CHARACTERS:
            return [self._unk_id]
        ids, start, pieces = [], 0, self._starts
        while start < len(word):
            id_, stop = pieces.longest(word, start)
            if id_ < 0:
                return [self._unk_id]
            ids.append(id_)
            start, pieces = stop, self._continuations
        return ids


class _Pieces:
    """Tokens to look up as a word is read character by character.

    `table` maps tokens to their ids, and prefixes of up to `_MAX_PREFIX` characters that are not
    tokens to -1. `lengths` maps the prefixes of longer tokens to their lengths, longest first.
    """

    def __init__(self, tokens: Iterable[tuple[str, int]]) -> None:
        self.table: dict[str, int] = {}
        lengths: dict[str, set[int]] = {}
        for token, id_ in tokens:
            if len(token) > MAX_WORD_CHARACTERS:  # no word is so long
                continue
            for end in range(1, min(len(token), _MAX_PREFIX + 1)):
                self.table.setdefault(token[:end], -1)
            self.table[token] = id_
            if len(token) > _MAX_PREFIX:
                lengths.setdefault(token[:_MAX_PREFIX], set()).add(len(token))
        self.lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}

    def longest(self, word: str, start: int) -> tuple[int, int]:
        """The id of the longest token at `start`, or -1, and the index of its end."""
        for length in self.lengths.get(word[start : start + _MAX_PREFIX], ()):
            id_ = self.table.get(word[start : start + length])
            if id_ is not None and start + length <= len(word):
                return id_, start + length
        longest, stop = -1, start
        for end in range(start + 1, min(len(word), start + _MAX_PREFIX) + 1):
            id_ = self.table.get(word[start:end])
            if id_ is None:
                break
            if id_ >= 0:
                longest, stop = id_, end
        return longest, stop
