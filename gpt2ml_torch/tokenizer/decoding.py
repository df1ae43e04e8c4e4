"""Ids to text: Chinese is joined without spaces, Latin words are separated by one.

Source: bojone/bert4keras, tokenizers.py, Tokenizer.decode.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from gpt2ml_torch.tokenizer.words import is_cjk, is_punctuation

if TYPE_CHECKING:
    from gpt2ml_torch.tokenizer.tokenizer import Tokenizer

Pieces = Sequence[tuple[str, bool]]

# Characters without a space after them: opening and joining ASCII, and all CJK punctuation.
NO_SPACE_AFTER = frozenset(
    "+-/={(<["
    "\u00b7\u2013\u2014\u2018\u2019\u201b\u201c\u201d\u201e\u201f\u2026\u2027"
    "\u3000\u3001\u3002\u3003\u3008\u3009\u300a\u300b\u300c\u300d\u300e\u300f\u3010\u3011\u3014"
    "\u3015\u3016\u3017\u3018\u3019\u301a\u301b\u301c\u301d\u301e\u301f\u3030\u303e\u303f"
    "\ufe4f\ufe51\ufe54\uff01\uff02\uff03\uff04\uff05\uff06\uff07\uff08\uff09\uff0a\uff0b\uff0c"
    "\uff0d\uff0f\uff1a\uff1b\uff1c\uff1d\uff1e\uff1f\uff20\uff3b\uff3c\uff3d\uff3e\uff3f\uff40"
    "\uff5b\uff5c\uff5d\uff5e\uff5f\uff60\uff61\uff62\uff63\uff64"
)
_CONTRACTIONS = frozenset(("re", "m", "s", "t", "ve", "d", "ll"))  # what may follow an apostrophe
_CONTRACTION_STARTS = _CONTRACTIONS | {part[:1] for part in _CONTRACTIONS}


def is_bracketed(token: str) -> bool:
    """Whether a token is one in square brackets, such as [SEP] or [unused1]."""
    return token.startswith("[") and token.endswith("]")


def steers_a_terminal(token: str) -> bool:
    """Whether a token holds a control character, which no word of a text has.

    Such a token in a stranger's vocabulary could move the cursor or clear the screen.
    """
    return not token.isprintable() and any(unicodedata.category(c) == "Cc" for c in token)


def decoded_piece(token: str) -> tuple[str, bool]:
    """Return the text that a token adds, and whether it is joined to the text before it."""
    if token == "" or is_bracketed(token) or steers_a_terminal(token):
        return "", True
    if token.startswith("##"):
        return token[2:], True
    if len(token) == 1 and is_cjk(token):
        return token, True
    if len(token) == 1 and is_punctuation(token):
        return token + " ", True
    return token, False


class StreamDecoder:
    """Decodes one id at a time; the texts of `put` and `end`, joined, equal `Tokenizer.decode`.

    `pieces` holds the `decoded_piece` of each id, and `check` returns an id or raises. Use
    `Tokenizer.stream_decoder` to make one.

    Text is returned at once, with two exceptions: spaces, since a later token may delete the space
    before it, and the one or two letters after "' ", which may be a contraction.
    """

    def __init__(
        self,
        pieces: Pieces | Tokenizer | None = None,
        *,
        check: Callable[[int], int] | None = None,
        tokenizer: Tokenizer | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        if check is None:  # the form of version 0.1.0
            warnings.warn(
                "StreamDecoder(tokenizer) is deprecated; call tokenizer.stream_decoder()",
                DeprecationWarning,
                stacklevel=2,
            )
            named: Any = pieces if tokenizer is None else tokenizer
            made = named.stream_decoder(skip_special_tokens=skip_special_tokens)
            self._pieces, self._checked = made._pieces, made._checked
        else:
            self._pieces, self._checked = cast(Pieces, pieces), check
        self._reset()

    def _reset(self) -> None:
        self._last = ""  # the last character of the tokens' text, before spaces are deleted
        self._given = ""  # the last two characters given out
        self._gap = False  # a space is waiting
        self._letters = ""  # the letters waiting behind that space

    def put(self, id_: int) -> str:
        """Take the next id and return the text that is now final, often the id's own."""
        text, joined = self._pieces[self._checked(id_)]
        if not text:
            return ""
        if not joined and not is_cjk(self._last):
            text = " " + text
        self._last = text[-1]
        if not self._given:
            text = text.lstrip()
        if self._gap or " " in text:
            return "".join([self._settle(character) for character in text])
        self._given = (self._given + text)[-2:]
        return text

    def end(self) -> str:
        """Return the text that was held back, and start again."""
        rest = " " + self._letters if self._letters else ""
        self._reset()
        return rest

    def _settle(self, character: str) -> str:
        """Take one character of the tokens' text and return the characters that are now final."""
        letters, used_up = self._letters + character, False
        if character == " ":
            contracted = self._letters in _CONTRACTIONS
            settled = self._letters if contracted else self._letters and " " + self._letters
            self._gap, self._letters = True, ""
        elif self._gap and self._given[-1] == "'" and letters in _CONTRACTION_STARTS:
            settled, self._letters = "", letters
        else:
            used_up = self._gap and self._goes_on_decimal(character)
            spaced = self._gap and not used_up and self._given[-1] not in NO_SPACE_AFTER
            settled = " " + letters if spaced else letters
            self._gap, self._letters = False, ""
        # bert4keras joins decimals by a substitution that consumes the digit after the point, so
        # that digit is not joined to a following point: "1. 2. 3" becomes "1.2. 3".
        self._given = " " if used_up else (self._given + settled)[-2:]
        return settled

    def _goes_on_decimal(self, character: str) -> bool:
        return self._given[0].isdecimal() and self._given[1:] == "." and character.isdecimal()
