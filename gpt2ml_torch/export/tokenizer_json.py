"""The tokenizer as Hugging Face's tokenizer.json: it gives the same ids and the same text.

The format's ready-made BERT tokenizer differs from the original's (see
`gpt2ml_torch.tokenizer.words`), so this one is built from the format's general rules. Each rule
lists its characters one by one, from the running Python's Unicode tables, which `Tokenizer` uses
too: other programs' tables may be of another Unicode version. What the format can't express is
listed in `tests/export/test_tokenizer_json.py`.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from gpt2ml_torch.tokenizer import Tokenizer
from gpt2ml_torch.tokenizer.decoding import NO_SPACE_AFTER
from gpt2ml_torch.tokenizer.wordpiece import MAX_WORD_CHARACTERS
from gpt2ml_torch.tokenizer.words import CJK_BLOCKS, is_punctuation

# The end token's text, in place of [SEP]. TRL appends the end token's text to every example, but
# the model was trained without one. This control character leaves no id in a tokenised text.
END_TOKEN = "\x03"

# BERT's vocabulary has an empty token; as a special token it needs a name that is not empty.
_RENAMED = {"[SEP]": END_TOKEN, "": "[]"}
_RENAMED_BACK = {there: ours for ours, there in _RENAMED.items()}
_UNASSIGNED = "\ufdd0"  # a noncharacter, which Unicode will never assign
# Letters whose decompositions the NFD rule's older tables lack: one of Unicode 13, and twelve of
# Unicode 16, which Python knows since 3.14.
_NOT_DECOMPOSED = (
    "\U00011938\U000105c9\U000105e4\U00011383\U00011385\U0001138e\U00011391"
    "\U000113c5\U000113c7\U000113c8\U00016d68\U00016d69\U00016d6a"
)
_CODES = (*range(0xD800), *range(0xE000, sys.maxunicode + 1))  # all but the surrogates
_GAP = "\ue000"  # stands for the space after punctuation until the tokens are joined


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json."""
    known = set("".join(vocabulary(tokenizer)))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id_,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, id_ in special_tokens(tokenizer).items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(known)},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                _split(_class(str.isspace), "Removed"),
                _split(_any_of(_CJK, _class(is_punctuation)), "Isolated"),
            ],
        },
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": _decoders()},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": MAX_WORD_CHARACTERS,
            "vocab": vocabulary(tokenizer),
        },
    }


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of each token; if a token stands on two lines, the later line counts."""
    tokens = [tokenizer.id_to_token(id_) or "" for id_ in range(tokenizer.vocab_size)]
    known = set(tokens)
    renamed = {ours: there for ours, there in _RENAMED.items() if there not in known}
    return {renamed.get(token, token): id_ for id_, token in enumerate(tokens)}


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The end token and the tokens in square brackets, which decoding leaves out, by id."""
    found = {
        token: id_
        for token, id_ in vocabulary(tokenizer).items()
        if token == END_TOKEN or (token.startswith("[") and token.endswith("]"))
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


def unreadable_lines(tokenizer: Tokenizer) -> dict[str, str]:
    """The lines of the vocabulary, by number, that `vocab_text` can't restore from the tokens."""
    guessed = _guess_lines(vocabulary(tokenizer))
    lines = tokenizer.vocab_text.split("\n")
    return {
        str(number): line
        for number, line in enumerate(lines)
        if number >= len(guessed) or guessed[number] != line
    }


def vocab_text(vocab: Mapping[str, int], lines: Mapping[str, str] | None) -> str:
    """Restore the vocabulary's text from tokenizer.json's `vocab` and the `unreadable_lines`.

    `lines` is None if they are lost. Raises `ValueError` for an impossible line number.
    """
    guessed = _guess_lines(vocab)
    if lines is None:
        return "\n".join(guessed) + "\n"
    for number in sorted(lines, key=int):
        if int(number) > len(guessed):
            raise ValueError(f"there is no line {number} in a vocabulary of {len(guessed)} tokens")
        guessed[int(number) : int(number) + 1] = [lines[number]]
    return "\n".join(guessed)


def _guess_lines(vocab: Mapping[str, int]) -> list[str]:
    """The line of each id from 0 to the highest; an id without a token gets an empty line."""
    guessed = [""] * (max(vocab.values(), default=-1) + 1)
    for token, id_ in vocab.items():
        guessed[id_] = _RENAMED_BACK.get(token, token)
    return guessed


# -- text to words --------------------------------------------------------------------------------


def _normalizers(known: Set[str]) -> list[dict[str, Any]]:
    """Rules that drop control characters, lower-case, decompose and drop accents, as BERT does.

    `known` holds the characters of the vocabulary.
    """
    # Tables of a later Unicode version may lower-case characters that are unassigned here.
    unassigned = _class_of(_without(_unassigned(), known))
    cased, ignorable = _class(_is_cased), _class(_is_case_ignorable)
    # The rule Lowercase sees one character at a time; only sigma's lower case depends on others.
    final_sigma = f"{cased}{ignorable}*\\KΣ(?!{ignorable}*{cased})"
    return [
        _replace(_class(_is_dropped), ""),
        _replace(unassigned, _UNASSIGNED),
        _replace(final_sigma, "ς"),
        {"type": "Lowercase"},
        *(
            _replace(character, unicodedata.normalize("NFD", character))
            for character in _NOT_DECOMPOSED
            if unicodedata.category(character) != "Cn"
        ),
        {"type": "NFD"},
        _replace(_class(_is_accent), ""),
    ]


def _is_accent(character: str) -> bool:
    return unicodedata.category(character) == "Mn"


def _is_dropped(character: str) -> bool:
    control = unicodedata.category(character) in ("Cc", "Cf") and character not in "\t\n\r"
    return control or character == "\ufffd"


def _is_cased(character: str) -> bool:
    """Whether a capital sigma after this character can end a word, by Python's rule."""
    return f"{character}Σ".lower().endswith("ς")


def _is_case_ignorable(character: str) -> bool:
    """Whether the rule for a final sigma ignores this character."""
    return f"a{character}Σ".lower().endswith("ς") and not _is_cased(character)


# -- ids to text ----------------------------------------------------------------------------------


def _decoders() -> list[dict[str, Any]]:
    """Rules that join tokens as `Tokenizer.decode` does.

    A rule can only insert a fixed text. So marks are inserted first: "##" before a token that is
    joined to the previous one, and `_GAP` for the space after punctuation.
    """
    punctuation, digit = _class(is_punctuation), _class(str.isdecimal)
    no_space_after = _class_of(_ranges(sorted(map(ord, NO_SPACE_AFTER))))
    return [
        _replace(f"\\A(?={_CJK}\\z)", "##"),
        _replace(f"(?<=\\A{punctuation})\\z", _GAP),
        _replace(f"\\A(?={punctuation}{_GAP}\\z)", "##"),
        {"type": "WordPiece", "prefix": "##", "cleanup": False},
        {"type": "Fuse"},
        _replace("\\A##", ""),  # WordPiece leaves the mark of the first token
        _replace(f"(?<={_CJK}) ", ""),  # a word after Chinese has no space before it
        _replace(f"[ {_GAP}]+", " "),
        _replace("(?<=') (?=(?:re|m|s|t|ve|d|ll) )", ""),
        _replace(f"(?<={no_space_after}) ", ""),
        _replace(f"(?<={digit}\\.) (?={digit})", ""),
        _replace("\\A +| +\\z", ""),
    ]


# -- the format's rules ---------------------------------------------------------------------------


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _split(pattern: str, behavior: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": behavior,
        "invert": False,
    }


@functools.cache
def _class(holds: Callable[[str], bool]) -> str:
    """A regular expression's class of all characters for which `holds` is true."""
    return _class_of(_ranges(map(ord, filter(holds, _assigned()))))


def _class_of(ranges: Iterable[tuple[int, int]]) -> str:
    return "[" + "".join(map(_range, ranges)) + "]"


def _any_of(*classes: str) -> str:
    return "[" + "".join(classes) + "]"


@functools.cache
def _assigned() -> list[str]:
    """All assigned characters except surrogates."""
    return [character for character in map(chr, _CODES) if unicodedata.category(character) != "Cn"]


@functools.cache
def _unassigned() -> list[tuple[int, int]]:
    """The ranges of unassigned characters, except in the CJK blocks."""
    ranges = _ranges(code for code in _CODES if unicodedata.category(chr(code)) == "Cn")
    for first, last in CJK_BLOCKS:
        ranges = _without_range(ranges, first, last)
    return ranges


def _ranges(codes: Iterable[int]) -> list[tuple[int, int]]:
    """The first and last code of each run of consecutive codes."""
    ranges: list[tuple[int, int]] = []
    first = last = -2
    for code in codes:
        if code != last + 1:
            ranges.append((first, last))
            first = code
        last = code
    return [*ranges, (first, last)][1:]


def _without(ranges: list[tuple[int, int]], characters: Iterable[str]) -> list[tuple[int, int]]:
    for character in characters:
        if unicodedata.category(character) == "Cn":
            ranges = _without_range(ranges, ord(character), ord(character))
    return ranges


def _without_range(
    ranges: Iterable[tuple[int, int]], first: int, last: int
) -> list[tuple[int, int]]:
    rest: list[tuple[int, int]] = []
    for low, high in ranges:
        parts = ((low, min(high, first - 1)), (max(low, last + 1), high))
        rest += dict.fromkeys(part for part in parts if part[0] <= part[1])
    return rest


def _range(bounds: tuple[int, int]) -> str:
    first, last = bounds
    return f"\\x{{{first:x}}}" if first == last else f"\\x{{{first:x}}}-\\x{{{last:x}}}"


_CJK = _class_of(CJK_BLOCKS)
