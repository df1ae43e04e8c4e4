"""Encoding against BERT's rule written out a second time, and against transformers' Python copy."""

from __future__ import annotations

import string
import sys
import time
import unicodedata
from typing import Any

import pytest

from gpt2ml_torch import Tokenizer
from gpt2ml_torch.tokenizer.words import WordSplitter
from tests.helpers.properties import example, given, settings, st

CHINESE_BLOCKS = [
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF)),
    *((0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0x2F800, 0x2FA1F)),
]
CHINESE = {chr(code) for first, last in CHINESE_BLOCKS for code in range(first, last + 1)}
WORDS = (
    "[PAD] [unused1] [unused2] [UNK] [CLS] [SEP] [MASK] ## a b ab abc ##a ##b ##bc ##abcd "
    "he ##llo hello é e ##e i ##ss ß ss σ ς ##σ ##ς α , ! # [ ] - mask 1 ##1 12 "
    "中 国 ##国 中国 。 豈 か ᄒ ##ᅡ \ue000 ##\ue000 \U0001d157 ##\U0001d165"
)
TOKENS = [*WORDS.split(), "", "x" * 200, "y" * 201, "##zzzzzzzzz"]
TOKENIZER = Tokenizer(TOKENS)
# Everything that one of the rules treats specially, next to everything else.
TRAPS = (
    "abcxyz12中国「」，。$^`~#[]'.: \t\n\r\x0b\x1c\x85\u00a0\u2028\u3000\0\ufffd\ufeff\u00ad\u200d"
    "Σςσ\u0345\u0301\u0323\u0f73\u302e\U0001d165\U0001d15e\U00016ff0\u0fb7\ufe0fİIıßẞÅé가한"
    "\uf900豈\U0002f800\U0002b820\U00030000\ue000\U0010ffff\u0378\ud800≠≮\u037e\u0387\u2126\u1fef"
)


def texts(traps: str, others: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Half of the characters are traps; `st.text` would melt them into one large alphabet."""
    return st.lists(st.sampled_from(traps) | others, max_size=60).map("".join)


def reference_words(text: str) -> list[str]:
    """BERT's basic tokenizer with lower-casing, step after step as it is described."""
    cleaned = ""
    for character in text:
        category = unicodedata.category(character)
        if character in "\t\n\r" or category == "Zs":
            cleaned += " "
        elif character not in "\0\ufffd" and category not in ("Cc", "Cf"):
            cleaned += f" {character} " if character in CHINESE else character
    words = []
    for token in cleaned.split():
        decomposed = unicodedata.normalize("NFD", token.lower())
        word = ""
        for character in decomposed:
            category = unicodedata.category(character)
            if category == "Mn":
                continue
            if character in string.punctuation or category[0] == "P":
                words += [word, character]
                word = ""
            else:
                word += character
        words.append(word)
    return " ".join(words).split()


def reference_pieces(word: str, vocab: dict[str, int]) -> list[str]:
    """Greedy longest match, trying every end from the right."""
    if len(word) > 200:
        return ["[UNK]"]
    pieces: list[str] = []
    while word:
        mark = "##" if pieces else ""
        fitting = (mark + word[:end] for end in range(len(word), 0, -1))
        piece = next((candidate for candidate in fitting if candidate in vocab), None)
        if piece is None:
            return ["[UNK]"]
        pieces.append(piece)
        word = word[len(piece) - len(mark) :]
    return pieces


def reference_ids(text: str, tokens: list[str]) -> list[int]:
    vocab = {token: id_ for id_, token in enumerate(tokens)}
    return [
        vocab[piece] for word in reference_words(text) for piece in reference_pieces(word, vocab)
    ]


def test_every_character_between_letters_and_between_chinese():
    splitter = WordSplitter()
    for first in range(0, sys.maxunicode + 1, 2048):
        block = map(chr, range(first, first + 2048))
        text = "".join(f"{c}中a{c}B中" for c in block)
        assert splitter.words(text) == reference_words(text), f"U+{first:04X}..{first + 2047:04X}"


@settings(max_examples=1000, deadline=None)
@given(texts(TRAPS, st.characters(codec=None)))
@example("ΑΣ ΑΣ. ΑΣ\u00adΑ ΣΑ 中Σ中 Σ\u0301Σ'Σ")
@example("a\U0001d165\u302e\u0301\ufe00\u302e\U0001d165 \U0001d15e\u302e")
def test_ids_of_any_text(text: str):
    assert WordSplitter().words(text) == reference_words(text)
    assert TOKENIZER.encode(text) == reference_ids(text, TOKENS)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1), st.text("ab", max_size=30))
def test_longest_match_with_any_vocabulary(pieces: list[str], word: str):
    tokens = ["[PAD]", "[UNK]", *pieces, *(f"##{piece}" for piece in pieces[::-1])]
    assert Tokenizer(tokens).encode(word) == reference_ids(word, tokens)


def test_every_character_is_treated_as_transformers_does_it_in_python():
    """But for unassigned and private ones, which it drops where the original keeps them."""
    name = "transformers.models.bert.tokenization_bert_legacy"
    legacy = pytest.importorskip(name, reason="this transformers has no BERT tokenizer in Python")
    vocab = {token: id_ for id_, token in enumerate(TOKENS)}
    split = legacy.WordpieceTokenizer(vocab, "[UNK]", max_input_chars_per_word=200).tokenize
    dropped = ("Cn", "Co", "Cs")
    characters = map(chr, range(sys.maxunicode + 1))
    known = [c for c in characters if unicodedata.category(c) not in dropped]
    for first in range(0, len(known), 4096):
        text = "".join(f"{c}中a{c}b" for c in known[first : first + 4096])
        words = legacy.BasicTokenizer().tokenize(text)
        assert TOKENIZER.encode(text) == [vocab[piece] for word in words for piece in split(word)]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("中国。", ["中", "国", "。"]),
        ("Hello,hello", ["hello", ",", "hello"]),
        ("[MASK]", ["[", "mask", "]"]),
        ("[PAD]", ["[", "[UNK]", "]"]),
        ("##a", ["#", "#", "a"]),
        ("abcabcd", ["abc", "##abcd"]),
        ("É", ["e"]),
        ("x" * 200, ["x" * 200]),
        ("a" * 200, ["a"] + ["##a"] * 199),
        ("a" * 201, ["[UNK]"]),
        ("a\ufffdb\0c", ["abc"]),
        ("X\u0301" * 200, ["x" * 200]),  # counted after accents are gone
        ("x" * 201, ["[UNK]"]),
        ("y" * 201, ["[UNK]"]),  # even where the vocabulary has it
        ("\ud800", ["[UNK]"]),  # a lone surrogate is a character like any other
        ("", []),
        ("\ufeff \n\0", []),
    ],
)
def test_what_becomes_of(text: str, tokens: list[str]):
    assert [TOKENIZER.id_to_token(id_) for id_ in TOKENIZER.encode(text)] == tokens


def test_a_batch_is_each_text_alone_whatever_came_before():
    texts = ["中国", "ΑΣ Σ", "", "a\u302e\U0001d165", "hello"]
    assert TOKENIZER.encode_batch(texts) == [Tokenizer(TOKENS).encode(text) for text in texts]


def test_a_list_is_not_a_text():
    texts: Any = ["中国"]
    with pytest.raises(TypeError, match="encode_batch"):
        TOKENIZER.encode(texts)


@pytest.mark.parametrize(
    "unit",
    [
        *("a", "Σ", "a ", "!", "\0", "\u0301\u0323", "\u302e\U0001d165"),
        *("\u0f73\u302e", "Σ\u0301", "x" * 199 + " "),
    ],
)
def test_time_is_linear_in_the_length(unit: str):
    def seconds(length: int) -> float:
        text = "中" + unit * (length // len(unit))
        start = time.process_time()
        TOKENIZER.encode(text)
        return time.process_time() - start

    seconds(1000)  # fills the tables
    # Quadratic time would make the second 400 times the first; the floor is the clock's noise.
    assert seconds(200_000) < 80 * max(seconds(10_000), 0.005)


def test_five_megabytes_of_chinese_within_three_seconds():
    text = "".join(map(chr, range(0x4E00, 0x9FA5))) + "，。\n"
    text *= 5_000_000 // len(text.encode()) + 1
    start = time.process_time()
    ids = TOKENIZER.encode(text)
    assert time.process_time() - start < 3
    assert len(ids) == len(text) - text.count("\n")
