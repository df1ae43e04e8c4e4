"""The vocabulary: where it is read from, how its lines become ids, and what it knows of them."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from pathlib import Path

import pytest

from gpt2ml_torch import GPT2ML, GPT2MLConfig, Tokenizer
from tests.helpers.properties import given, st

TOKENS = ["[PAD]", "[unused1]", "[unused2]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
          "a", "##a", "\u2028", "中", "##\u2028", "国", "##", "。"]  # fmt: skip
TEXT = "\n".join(TOKENS) + "\n"


def save_model(path: Path, vocab: Tokenizer | None, rows: int = len(TOKENS)) -> None:
    config = GPT2MLConfig(
        vocab_size=rows, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=4,
    )  # fmt: skip
    GPT2ML(config).save_pretrained(path, tokenizer=vocab)


def test_lines_end_at_a_line_feed_only_and_are_stripped():
    tokenizer = Tokenizer(TEXT)
    assert len(tokenizer) == tokenizer.vocab_size == len(TOKENS) < len(TEXT.splitlines())
    assert tokenizer.id_to_token(9) == ""
    assert tokenizer.token_to_id("中") == 10
    assert tokenizer.encode("中a。") == [10, 7, 14]
    assert tokenizer.decode(range(len(TOKENS))) == "aa中国。"


@pytest.mark.parametrize(
    "text",
    [
        TEXT.removesuffix("\n"),
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("\n", "\r\n").removesuffix("\r\n"),
        "\ufeff" + TEXT,
        TEXT.replace("\n", " \t\n"),
        TEXT.replace("[MASK]", "[MA\rSK]"),  # TensorFlow's reader drops every carriage return
    ],
)
def test_line_ends_and_surrounding_space_make_no_difference(text: str, tmp_path: Path):
    assert Tokenizer(text) == Tokenizer(TEXT)
    (tmp_path / "vocab.txt").write_bytes(text.encode())
    tokenizer = Tokenizer.from_pretrained(tmp_path / "vocab.txt")
    assert tokenizer == Tokenizer(TEXT)
    assert tokenizer.vocab_text == text  # so it can be written again byte for byte


@given(st.text(st.sampled_from("ab#[]中\n\r\u2028\x85 \ufeff")))
def test_the_text_comes_back_unchanged(rest: str):
    text = "[PAD]\n[UNK]\n" + rest
    assert Tokenizer(text).vocab_text == text
    assert Tokenizer(text).vocab_size == len(text.replace("\r", "").removesuffix("\n").split("\n"))


def test_a_blank_line_is_an_id_of_its_own():
    assert Tokenizer("[PAD]\n\n[UNK]\na\n").token_to_id("a") == 3


def test_of_two_equal_lines_the_later_one_is_encoded_and_the_earlier_one_banned():
    tokenizer = Tokenizer(["[PAD]", "[UNK]", "a", "b", "a"])
    assert tokenizer.encode("a b") == [4, 3]
    assert tokenizer.decode([2, 3]) == "a b"
    assert tokenizer.banned_ids == (0, 1, 2)


def test_tokens_and_text_are_the_same_vocabulary():
    assert Tokenizer(TOKENS) == Tokenizer(TEXT)
    assert Tokenizer(TOKENS).vocab_text == TEXT


def test_what_is_known_of_the_ids():
    tokenizer = Tokenizer(TEXT, num_embeddings=17)
    assert (tokenizer.pad_id, tokenizer.unk_id) == (0, 3)
    assert tokenizer.special_ids == (0, 3, 4, 5, 6)
    assert tokenizer.banned_ids == (0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 15, 16)
    assert (tokenizer.vocab_size, tokenizer.num_embeddings) == (15, 17)
    assert tokenizer.token_to_id("##a") == 8
    assert tokenizer.token_to_id("b") is None
    assert tokenizer.id_to_token(8) == "##a"
    assert tokenizer.id_to_token(16) is None
    assert tokenizer.unknown_share(tokenizer.encode("a b中B")) == 0.5
    assert tokenizer.unknown_share([]) == 0.0
    assert repr(tokenizer) == "Tokenizer(15 tokens, 2 reserved ids)"


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))]
)
def test_copies_are_equal(copied):
    tokenizer = Tokenizer("\ufeff" + TEXT, num_embeddings=17)
    tokenizer.encode("中")
    twin = copied(tokenizer)
    assert twin == tokenizer
    assert hash(twin) == hash(tokenizer)
    assert (twin.vocab_text, twin.num_embeddings) == (tokenizer.vocab_text, 17)
    assert twin.encode("a中。") == tokenizer.encode("a中。")


def test_another_vocabulary_is_unequal():
    assert Tokenizer(TEXT) != Tokenizer(TEXT + "b\n")
    assert Tokenizer(TEXT) != Tokenizer(TEXT, num_embeddings=17)
    assert Tokenizer(TEXT) != TEXT


@pytest.mark.parametrize("name", ["vocab.txt", "clue-vocab.txt", "model.safetensors"])
def test_a_file_or_its_folder_is_read(name: str, tmp_path: Path):
    path = tmp_path / name
    if name.endswith(".txt"):
        path.write_bytes(TEXT.encode())
    else:
        save_model(path, Tokenizer(TEXT))
    for source in (path, str(path), tmp_path, str(tmp_path)):
        assert Tokenizer.from_pretrained(source) == Tokenizer(TEXT)


def test_a_converted_file_keeps_the_text_and_its_rows_are_the_ids(tmp_path: Path):
    text = "\ufeff" + TEXT.replace("\n", "\r\n")
    save_model(tmp_path / "m.safetensors", Tokenizer(text), rows=17)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "m.safetensors")
    assert (tokenizer.vocab_text, tokenizer.num_embeddings) == (text, 17)
    assert tokenizer.decode([16, 10]) == "中"


def test_a_converted_file_is_known_by_its_content(tmp_path: Path):
    save_model(tmp_path / "model", Tokenizer(TEXT))
    assert Tokenizer.from_pretrained(tmp_path / "model") == Tokenizer(TEXT)


def test_a_converted_file_without_vocabulary_says_what_to_do(tmp_path: Path):
    save_model(tmp_path / "m.safetensors", None)
    with pytest.raises(ValueError, match=r"m\.safetensors holds no vocabulary: convert it again"):
        Tokenizer.from_pretrained(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\n[UNK]\n\xff\xfe\n", "not UTF-8: byte 0xff in line 3"),
        (TEXT.encode("utf-16"), "not UTF-8"),
        (TEXT.replace("国", "國").encode("gb18030"), "not UTF-8"),
        (b"", r"0 tokens but no \[PAD\]"),
        (b"[PAD]\na\n", r"2 tokens but no \[UNK\]"),
        (b"[UNK]\na\n", r"2 tokens but no \[PAD\]"),
        (b'{"vocab_size": 21128}', r"1 tokens but no \[PAD\]"),
        (bytes(9_000_000), "more than 8,388,608 bytes.*expected a vocabulary"),
    ],
)
def test_what_is_no_vocabulary_is_an_error_of_one_line(
    content: bytes, message: str, tmp_path: Path
):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_pretrained(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_an_empty_folder_and_a_choice_of_files_are_errors(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.txt"):
        Tokenizer.from_pretrained(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match=r"neither a vocab\.txt nor"):
        Tokenizer.from_pretrained(tmp_path)
    for name in ("a-vocab.txt", "b-vocab.txt"):
        (tmp_path / name).write_bytes(TEXT.encode())
    with pytest.raises(ValueError, match=r"2 candidates \(a-vocab\.txt, b-vocab\.txt\)"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_vocabulary_larger_than_the_embedding_is_an_error():
    with pytest.raises(ValueError, match="15 tokens but the model only 14 embeddings"):
        Tokenizer(TEXT, num_embeddings=14)


def test_a_token_of_two_lines_is_an_error():
    with pytest.raises(ValueError, match=r"token 2 \('a\\nb'\) holds a line break"):
        Tokenizer(["[PAD]", "[UNK]", "a\nb"])


def test_a_vocabulary_of_long_tokens_takes_memory_in_proportion() -> None:
    tokens = ["[PAD]", "[UNK]", "a" * 1024, *(chr(97 + i) * 199 + "b" for i in range(26))]
    tracemalloc.start()
    tokenizer = Tokenizer(tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20  # with a table of every prefix, gigabytes
    assert tokenizer.encode("a" * 199 + "b") == [3]
    assert tokenizer.encode("a" * 200) == [1]
    with pytest.raises(ValueError, match="has 9,000,013 characters; expected at most 8,388,608"):
        Tokenizer("[PAD]\n[UNK]\n" + "a" * 9_000_000 + "\n")


@pytest.mark.parametrize("start", ["", "##", "[unused"])
def test_a_line_too_long_for_a_token_is_an_error_with_its_number(start: str) -> None:
    long = start + "字" * (1025 - len(start))
    Tokenizer(["[PAD]", "[UNK]", long[:-1]])
    with pytest.raises(ValueError, match=r"^line 3 has 1,025 characters; .* at most 1,024$"):
        Tokenizer(["[PAD]", "[UNK]", long])


def longest_match(ids: dict[str, int], word: str) -> list[int]:
    """The rule as the original states it: try every end, the longest first."""
    found, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in ids:
                found.append(ids[piece])
                start = end
                break
        else:
            return [1]
    return found


LENGTHS = st.sampled_from([1, 2, 30, 31, 32, 33, 34, 60, 64, 65])
PIECES = st.builds(
    lambda n, last, more: "##" * more + "a" * n + last,
    LENGTHS,
    st.sampled_from(["", "b", "ab", "ba"]),
    st.booleans(),
)


@given(tokens=st.lists(PIECES, max_size=8), word=st.lists(PIECES, min_size=1, max_size=3))
def test_long_tokens_are_matched_as_the_original_matches_them(
    tokens: list[str], word: list[str]
) -> None:
    tokenizer = Tokenizer(["[PAD]", "[UNK]", *tokens])
    text = "".join(word).replace("#", "")[:200]
    ids = {token: id_ for id_, token in enumerate(["[PAD]", "[UNK]", *tokens])}
    assert tokenizer.encode(text) == longest_match(ids, text)


def test_blank_lines_too_many_at_the_end_of_a_vocabulary_are_dropped(tmp_path: Path) -> None:
    text = "[PAD]\n[UNK]\n\n春\n"
    for more in ("", "\n", "\n \n\r\n"):
        tokenizer = Tokenizer(text + more, num_embeddings=4)
        assert (len(tokenizer), tokenizer.encode("春")) == (4, [3])
        assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    with pytest.raises(ValueError, match="has 5 tokens but the model only 4"):
        Tokenizer(text + "眠\n", num_embeddings=4)


def test_a_token_with_control_characters_reaches_no_terminal() -> None:
    tokens = ["[PAD]", "[UNK]", "春", "\x1b[2J", "##\x9b1m", "[a\x07]", "a\x7f", "a\rb", "眠"]
    tokenizer = Tokenizer(tokens)
    for skip in (True, False):
        assert tokenizer.decode(range(2, 9), skip_special_tokens=skip) == "春ab眠"
    assert set(range(3, 7)) <= set(tokenizer.banned_ids)


def test_the_files_that_a_mac_leaves_beside_a_vocabulary_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "my-vocab.txt").write_text("[PAD]\n[UNK]\n", encoding="utf-8")
    (tmp_path / "._my-vocab.txt").write_bytes(b"\0\x05\x16\x07")
    (tmp_path / "._vocab.txt").write_bytes(b"\0\x05\x16\x07")
    assert len(Tokenizer.from_pretrained(tmp_path)) == 2
