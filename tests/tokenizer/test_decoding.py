"""Decoding, whole and streamed, against bert4keras's substitutions written out a second time."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from gpt2ml_torch import StreamDecoder, Tokenizer
from tests.helpers.properties import example, given, settings, st

WORDS = (
    "[PAD] [unused1] [UNK] [CLS] [SEP] [MASK] ## a the ##s hello world ##e ##l "
    "re m s t ve v d l ll r 1 2 30 ##4 ٣ . , ' ##' - ( ) / = < [ ] % $ "
    "中 国 ##国 \U00020000 中国 a中 。 ， “ ” — … 「 」 · か it's 3. \ue000 ##-"
)
TOKENS = [*WORDS.split(), "", "a b", "x- y", "##. 5", "##\u3000z"]
RESERVED = 2
TOKENIZER = Tokenizer(TOKENS, num_embeddings=len(TOKENS) + RESERVED)


def ids_of(tokens: str) -> list[int]:
    return [TOKENS.index(token) for token in tokens.split(" ") if token]


IDS = st.lists(st.integers(0, TOKENIZER.num_embeddings - 1), max_size=40)
# Where the spaces are decided: quotes, contractions, numbers, punctuation.
TIGHT = st.lists(st.sampled_from(ids_of("' s ve v re l ll ##e 1 2 ##4 . - , a 中")), max_size=40)
CJK_PUNCTUATION = (
    r"[\uff02-\uff0d\uff0f\uff1a-\uff1e\uff20\uff3b-\uff40\uff5b-\uff60\uff62-\uff64\u3000\u3001\u3003"
    r"\u3008-\u3011\u3014-\u301f\u3030\u303e\u303f\u2013\u2014\u2018\u2019\u201b-\u201f\u2026\u2027"
    r"\ufe4f\ufe51\ufe54\u00b7\uff01\uff1f\uff61\u3002+\-/={(<\[] "
)


def is_chinese(text: str) -> bool:
    blocks = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf]"
    return re.fullmatch(blocks, text) is not None


def is_punctuation(text: str) -> bool:
    return re.fullmatch(r"[!-/:-@\[-`{-~。，“”—…「」·]", text) is not None


def reference_text(ids: list[int], keep: bool = False) -> str:
    """Join the tokens by their kind, then delete spaces with one substitution after another."""
    text = ""
    for id_ in ids:
        token = TOKENS[id_] if id_ < len(TOKENS) else ""
        special = token[:1] == "[" and token[-1:] == "]"
        if token in ("", "##") or (special and not keep):
            continue
        if token.startswith("##"):
            text += token[2:]
        elif is_chinese(token):
            text += token
        elif is_punctuation(token):
            text += token + " "
        elif is_chinese(text[-1:]):
            text += token
        else:
            text += " " + token
    text = re.sub(" +", " ", text)
    text = re.sub("' (re|m|s|t|ve|d|ll) ", r"'\1 ", text)
    text = re.sub(CJK_PUNCTUATION, lambda match: match[0][:1], text)
    text = re.sub(r"(\d\.) (\d)", r"\1\2", text)
    return text.strip()


@settings(max_examples=1000, deadline=None)
@given(IDS | TIGHT, st.booleans())
@example(ids_of("1 . 2 . 30 . 1"), False)
@example(ids_of("3. 1"), False)  # a number and its point in one token
@example(ids_of("##\u3000z ' ve ' s a"), False)
def test_text_of_any_ids(ids: list[int], keep: bool):
    assert TOKENIZER.decode(ids, skip_special_tokens=not keep) == reference_text(ids, keep)


@settings(max_examples=1000, deadline=None)
@given(IDS | TIGHT, st.booleans())
def test_streamed_pieces_join_to_the_text(ids: list[int], keep: bool):
    stream = TOKENIZER.stream_decoder(skip_special_tokens=not keep)
    pieces = [stream.put(id_) for id_ in ids] + [stream.end()]
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=not keep)
    assert [stream.put(id_) for id_ in ids] + [stream.end()] == pieces  # `end` starts again


@settings(max_examples=300, deadline=None)
@given(TIGHT | IDS)
@example(ids_of("' a"))
def test_a_stream_holds_back_nothing_that_is_certain(ids: list[int]):
    stream = TOKENIZER.stream_decoder()
    given_out = "".join(stream.put(id_) for id_ in ids)
    # What every continuation agrees on; these few tell all open decisions apart.
    endings = ["", "a", "s a", "1", "##e", "##e a", "##l a", "-", "中"]
    texts = [TOKENIZER.decode(ids + ids_of(ending)) for ending in endings]
    shared = 0
    while all(len(text) > shared and text[shared] == texts[0][shared] for text in texts):
        shared += 1
    assert texts[0].startswith(given_out)
    assert given_out.rstrip() == texts[0][:shared].rstrip()


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("中 国 。 中 国 ， 国", "中国。中国，国"),
        ("hello world", "hello world"),
        ("中 hello world 国", "中hello world国"),
        ("the ##s 中 ##国", "thes中国"),
        ("hello , world", "hello, world"),
        ("a ' s hello ' ve . the ' ll", "a's hello' ve. the' ll"),
        ("1 . 2 % 中", "1.2% 中"),
        ("1 . 2 . 30", "1.2. 30"),
        ("a - a ( a ) a", "a-a(a) a"),
        ("“ a ” — …", "“a”—…"),
        ("[CLS] 中 [UNK] 国 [PAD] [unused1] ## [SEP]", "中国"),
        ("##s ##s", "ss"),
        ("[ a ]", "[a]"),
    ],
)
def test_how_tokens_are_joined(tokens: str, text: str):
    assert TOKENIZER.decode(ids_of(tokens)) == text


def test_a_character_is_given_out_as_soon_as_its_id_is_put():
    stream = TOKENIZER.stream_decoder()
    pieces = [stream.put(id_) for id_ in ids_of("中 国 , a ' s a 。")] + [stream.end()]
    assert pieces == ["中", "国", ",", " a", "'", "", "s a", "。", ""]


def test_special_tokens_are_shown_on_request():
    ids = ids_of("[CLS] 中 [UNK] a [MASK]")
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == "[CLS]中[UNK] a [MASK]"


def test_ids_without_a_token_decode_to_nothing():
    ids = ids_of("hello")
    assert (
        TOKENIZER.decode([len(TOKENS), *ids, len(TOKENS) + 1, TOKENS.index(""), *ids_of("##s")])
        == "hellos"
    )


@pytest.mark.parametrize("id_", [-1, len(TOKENS) + RESERVED, 10**12])
def test_an_id_outside_the_embedding_is_refused(id_: int):
    with pytest.raises(
        ValueError, match=f"token id {id_} is out of range: .* 0 to {len(TOKENS) + 1}"
    ):
        TOKENIZER.decode([id_])
    with pytest.raises(ValueError, match="out of range"):
        TOKENIZER.stream_decoder().put(id_)
    with pytest.raises(ValueError, match="out of range"):
        TOKENIZER.id_to_token(id_)


def test_ids_come_in_any_container():
    ids = ids_of("中 hello world")
    containers = [
        tuple(ids),
        iter(ids),
        np.array(ids),
        torch.tensor(ids),
        torch.tensor(ids, dtype=torch.int32),
    ]
    assert {TOKENIZER.decode(container) for container in containers} == {"中hello world"}
    stream = TOKENIZER.stream_decoder()
    assert "".join(stream.put(id_) for id_ in torch.tensor(ids)) + stream.end() == "中hello world"


@pytest.mark.parametrize("ids", [7, torch.tensor(7), torch.zeros(2, 3, dtype=torch.long)])
def test_what_is_not_one_sequence_is_refused(ids: Any):
    with pytest.raises(ValueError, match="one sequence of ids"):
        TOKENIZER.decode(ids)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("arguments", [((TOKENIZER,), {}), ((), {"tokenizer": TOKENIZER})])
def test_a_decoder_made_as_in_version_0_1_0_decodes_and_warns(keep: bool, arguments: Any) -> None:
    ids, (positional, named) = ids_of("[CLS] hello ##s 中 , [SEP]"), arguments
    with pytest.warns(DeprecationWarning, match=r"call tokenizer\.stream_decoder"):
        decoder = StreamDecoder(*positional, **named, skip_special_tokens=not keep)
    text = "".join(decoder.put(id_) for id_ in ids) + decoder.end()
    assert text == TOKENIZER.decode(ids, skip_special_tokens=not keep)


@settings(max_examples=300, deadline=None)
@given(st.text("中国。，「」", max_size=30))
def test_chinese_text_survives_the_round_trip(text: str):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["hello", "world", "the", "thes", "a"]), max_size=20))
def test_latin_words_survive_the_round_trip(words: list[str]):
    assert TOKENIZER.decode(TOKENIZER.encode(" ".join(words))) == " ".join(words)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [i for i, t in enumerate(TOKENS) if re.fullmatch(r"[中国hello。，a1.\-]+", t)]
        )
    )
)
def test_encoding_a_decoded_text_changes_it_no_more(ids: list[int]):
    text = TOKENIZER.decode(ids)
    assert TOKENIZER.decode(TOKENIZER.encode(text)).replace(" ", "") == text.replace(" ", "")
