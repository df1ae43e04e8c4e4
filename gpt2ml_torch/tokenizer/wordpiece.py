"""Words to ids: WordPiece's greedy longest match.

Source: google-research/bert, tokenization.py, WordpieceTokenizer, as vendored by imcaspar/gpt2-ml.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MAX_WORD_CHARACTERS = 200  # a longer word is one [UNK]
# Longer tokens are found by their first so many characters and their lengths. With a table of every
# prefix, one token of 200,000 characters would take gigabytes.
_MAX_PREFIX = 32


class WordPiece:
    """Splits words into tokens of a vocabulary.

    `ids` maps each token to its id, those that go on a word beginning with "##".
    """

    def __init__(self, ids: Mapping[str, int], *, unk_id: int) -> None:
        self._unk_id = unk_id
        self._starts = _Pieces(ids.items())
        self._continuations = _Pieces(
            (token[2:], id_) for token, id_ in ids.items() if token.startswith("##")
        )

    def split(self, word: str) -> list[int]:
        """The ids of a word, the longest possible token first; [UNK] if any part has none."""
        if len(word) > MAX_WORD_CHARACTERS:
            return [self._unk_id]
        ids, start, pieces = [], 0, self._starts
        while start < len(word):
            table, longest, stop = pieces.table, -1, start
            end = start
            for end in range(start + 1, min(len(word), start + _MAX_PREFIX) + 1):
                id_ = table.get(word[start:end])
                if id_ is None:
                    break
                if id_ >= 0:
                    longest, stop = id_, end
            if end - start == _MAX_PREFIX and pieces.lengths:
                for length in pieces.lengths.get(word[start:end], ()):
                    id_ = table.get(word[start : start + length])
                    if id_ is not None and start + length <= len(word):
                        longest, stop = id_, start + length
                        break
            if longest < 0:
                return [self._unk_id]
            ids.append(longest)
            start, pieces = stop, self._continuations
        return ids


class _Pieces:
    """Tokens to look up as a word is read character by character.

    `table` maps tokens to their ids, and what only begins a token, up to `_MAX_PREFIX` characters,
    to -1. `lengths` maps what begins longer tokens to their lengths, longest first.
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
