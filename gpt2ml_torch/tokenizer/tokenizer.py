"""Tokenizer: text to token ids and back, exactly as the original's BERT WordPiece did.

Sources: encoding, google-research/bert, tokenization.py, as vendored by imcaspar/gpt2-ml;
decoding, bojone/bert4keras, tokenizers.py, Tokenizer.decode.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from gpt2ml_torch.modelfile.reader import ModelFile
from gpt2ml_torch.tokenizer.words import WordSplitter, is_cjk, is_punctuation

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD_CHARACTERS = 200  # a longer word is one [UNK]
_MAX_VOCAB_BYTES = 1 << 26  # 64 MiB; the published files have 0.1: what is larger is another file

# What decoding leaves no space after: opening and joining ASCII, and all CJK punctuation.
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


class Tokenizer:
    """A BERT-format vocabulary and the two directions between text and its ids.

    `vocab` is the vocabulary file's text (one token a line, split at "\\n" only) or its tokens.
    `num_embeddings` is the number of rows of the model's embedding where it exceeds the number of
    tokens: the ids in between are reserved, decode to nothing and are never generated.

    Raises ValueError for a vocabulary without [PAD] or [UNK], or with more tokens than embeddings.
    """

    def __init__(self, vocab: str | Sequence[str], *, num_embeddings: int | None = None) -> None:
        self._vocab_text = vocab if isinstance(vocab, str) else _join_lines(vocab)
        self._tokens = _split_lines(self._vocab_text)
        self._num_embeddings = len(self._tokens) if num_embeddings is None else num_embeddings
        # Of a token that stands on two lines the later id wins, as in the original.
        self._ids = {token: id_ for id_, token in enumerate(self._tokens)}
        self._check()
        self._words = {t: i for t, i in self._ids.items() if len(t) <= MAX_WORD_CHARACTERS}
        self._starts = _with_prefixes(self._ids.items())
        self._continuations = _with_prefixes(
            (token[2:], id_) for token, id_ in self._ids.items() if token.startswith("##")
        )
        self._splitter = WordSplitter()
        reserved = [""] * (self._num_embeddings - len(self._tokens))
        self._pieces = [_decoded_piece(token) for token in self._tokens + reserved]

    def _check(self) -> None:
        for token in ("[PAD]", "[UNK]"):
            if token not in self._ids:
                raise ValueError(
                    f"the vocabulary has {len(self._tokens)} tokens but no {token}: expected BERT's"
                    " format, one token a line (for a file, use Tokenizer.from_pretrained)"
                )
        if self._num_embeddings < len(self._tokens):
            raise ValueError(
                f"the vocabulary has {len(self._tokens)} tokens but the model only"
                f" {self._num_embeddings} embeddings: give the vocabulary it was trained with"
            )

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str], *, num_embeddings: int | None = None
    ) -> Tokenizer:
        """Read the vocabulary of a converted .safetensors file, of a vocab.txt, or of its folder.

        `num_embeddings` defaults to the model's number in a converted file, else to the tokens'.

        Raises OSError where nothing can be read, ValueError where it holds no vocabulary.
        """
        path = _find_vocab(Path(path))
        if not _is_converted(path):
            text = _read_text(path)
        else:
            with ModelFile.open(path) as file:
                if file.vocab is None:
                    raise ValueError(f"{path} holds no vocabulary: convert it again with one")
                text = file.vocab
                num_embeddings = num_embeddings or file.config.vocab_size
        try:
            return cls(text, num_embeddings=num_embeddings)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    # -- text to ids ------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without any special token; "[MASK]" in it is plain text.

        Characters are classified by the running Python's `unicodedata`, as the original did.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes one str, not {type(text).__name__}: see encode_batch")
        ids: list[int] = []
        known = self._words.get
        for word in self._splitter.words(text):
            id_ = known(word)
            if id_ is None:
                ids += self._split_word(word)
            else:
                ids.append(id_)
        return ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def _split_word(self, word: str) -> list[int]:
        """Greedy longest match from the left; one [UNK] for all if any part has no match."""
        if len(word) > MAX_WORD_CHARACTERS:
            return [self.unk_id]
        ids, start, table = [], 0, self._starts
        while start < len(word):
            longest, stop = -1, start
            for end in range(start + 1, len(word) + 1):
                id_ = table.get(word[start:end])
                if id_ is None:
                    break
                if id_ >= 0:
                    longest, stop = id_, end
            if longest < 0:
                return [self.unk_id]
            ids.append(longest)
            start, table = stop, self._continuations
        return ids

    # -- ids to text ------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`, any iterable of integers or a 1-D tensor.

        Chinese is joined without spaces, Latin words keep one between them; "##", ids without a
        token and, unless told otherwise, tokens in square brackets leave nothing behind.

        Raises ValueError for an id outside the model's embedding.
        """
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        if isinstance(ids, int) or (isinstance(ids, list) and ids and isinstance(ids[0], list)):
            raise ValueError("decode takes one sequence of ids, found a single id or a batch")
        stream = self.stream_decoder(skip_special_tokens=skip_special_tokens)
        return "".join([stream.put(id_) for id_ in ids]) + stream.end()

    def stream_decoder(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """Return a decoder that takes one id at a time."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)

    # -- the vocabulary ---------------------------------------------------------------------------

    @property
    def vocab_text(self) -> str:
        """The vocabulary file's text, unchanged."""
        return self._vocab_text

    @property
    def vocab_size(self) -> int:
        """The number of tokens, without reserved ids."""
        return len(self._tokens)

    @property
    def num_embeddings(self) -> int:
        """The number of ids, reserved ones included."""
        return self._num_embeddings

    @property
    def pad_id(self) -> int:
        """The id of [PAD]."""
        return self._ids["[PAD]"]

    @property
    def unk_id(self) -> int:
        """The id of [UNK]."""
        return self._ids["[UNK]"]

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of those of [PAD], [UNK], [CLS], [SEP], [MASK] that there are, in that order."""
        return tuple(self._ids[token] for token in SPECIAL_TOKENS if token in self._ids)

    @functools.cached_property
    def banned_ids(self) -> tuple[int, ...]:
        """The ids that generation never produces, ascending: special, reserved and textless ones,
        [unused1] and its like, and those shadowed by a later line with the same token.
        """
        textless = {id_ for id_, (text, _) in enumerate(self._pieces) if not text}
        shadowed = {id_ for id_, token in enumerate(self._tokens) if self._ids[token] != id_}
        return tuple(sorted(textless | shadowed))

    def token_to_id(self, token: str) -> int | None:
        """Return the id of exactly this token ("##" included), or None."""
        return self._ids.get(token)

    def id_to_token(self, id_: int) -> str | None:
        """Return the token, or None for a reserved id; ValueError for one out of range."""
        id_ = self._checked(id_)
        return self._tokens[id_] if id_ < len(self._tokens) else None

    def unknown_share(self, ids: Sequence[int]) -> float:
        """Return the share of [UNK] among `ids`, 0.0 for none."""
        return sum(id_ == self.unk_id for id_ in ids) / len(ids) if len(ids) else 0.0

    def _checked(self, id_: int) -> int:
        id_ = operator.index(id_)
        if not 0 <= id_ < self._num_embeddings:
            raise ValueError(
                f"token id {id_} is out of range: this vocabulary has ids 0 to"
                f" {self._num_embeddings - 1}"
            )
        return id_

    @functools.cached_property
    def _all_pieces(self) -> list[tuple[str, bool]]:
        """`_pieces`, but with the tokens in square brackets as text."""
        pieces = list(self._pieces)
        for id_, token in enumerate(self._tokens):
            if _is_bracketed(token):
                pieces[id_] = token, False
        return pieces

    def __len__(self) -> int:
        return len(self._tokens)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenizer):
            return NotImplemented
        return (self._tokens, self._num_embeddings) == (other._tokens, other._num_embeddings)

    def __hash__(self) -> int:
        return hash((*self._tokens, self._num_embeddings))

    def __reduce__(self) -> tuple[Any, ...]:
        remake = functools.partial(type(self), num_embeddings=self._num_embeddings)
        return remake, (self._vocab_text,)

    def __repr__(self) -> str:
        reserved = self._num_embeddings - len(self._tokens)
        return f"Tokenizer({len(self._tokens)} tokens, {reserved} reserved ids)"


class StreamDecoder:
    """Decodes one id at a time: what `put` and `end` return, joined, is `Tokenizer.decode`'s text.

    Everything is given out at once but spaces, since a later token may delete the space before it,
    and the one or two letters after "' ", until it is clear whether they are a contraction.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._checked = tokenizer._checked
        self._pieces = tokenizer._pieces if skip_special_tokens else tokenizer._all_pieces
        self._reset()

    def _reset(self) -> None:
        self._last = ""  # the last character of the tokens' text, before spaces are deleted
        self._given = ""  # the last two characters given out
        self._gap = False  # a space is waiting
        self._letters = ""  # the letters waiting behind that space

    def put(self, id_: int) -> str:
        """Take the next id and return the text that has become certain, often that of the id."""
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
        """Return what was held back, and start anew."""
        rest = " " + self._letters if self._letters else ""
        self._reset()
        return rest

    def _settle(self, character: str) -> str:
        """Take one character of the tokens' text and return what it makes certain."""
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
        # bert4keras joins decimals by a substitution that uses up the digit after the point, which
        # then joins no further: "1. 2. 3" becomes "1.2. 3".
        self._given = " " if used_up else (self._given + settled)[-2:]
        return settled

    def _goes_on_decimal(self, character: str) -> bool:
        return self._given[0].isdecimal() and self._given[1:] == "." and character.isdecimal()


# -- vocabulary files -----------------------------------------------------------------------------


def _split_lines(text: str) -> list[str]:
    """Split a vocabulary as the original reads it: at "\\n" alone, each line stripped.

    TensorFlow's line reader, which the original used, drops every "\\r".
    """
    lines = text.removeprefix("\ufeff").replace("\r", "").split("\n")
    if lines[-1] == "":  # the end of the last line, not another line
        lines.pop()
    return [line.strip() for line in lines]


def _join_lines(tokens: Sequence[str]) -> str:
    for id_, token in enumerate(tokens):
        if "\n" in token:
            raise ValueError(f"token {id_} ({token!r}) holds a line break: tokens are single lines")
    return "".join(f"{token}\n" for token in tokens)


def _with_prefixes(tokens: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Map each token to its id, and what only begins a token to -1."""
    table: dict[str, int] = {}
    for token, id_ in tokens:
        for end in range(1, len(token)):
            table.setdefault(token[:end], -1)
        table[token] = id_
    return table


def _is_bracketed(token: str) -> bool:
    return token.startswith("[") and token.endswith("]")


def _decoded_piece(token: str) -> tuple[str, bool]:
    """Return what a token adds to a text, and whether it is joined to what stands before it."""
    if token == "" or _is_bracketed(token):
        return "", True
    if token.startswith("##"):
        return token[2:], True
    if len(token) == 1 and is_cjk(token):
        return token, True
    if len(token) == 1 and is_punctuation(token):
        return token + " ", True
    return token, False


def _find_vocab(path: Path) -> Path:
    """Return the file itself, or the one in a folder that holds the vocabulary."""
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(
                f"no file {path}: expected a converted .safetensors file, a vocab.txt or its folder"
            )
        return path
    for pattern in ("vocab.txt", "*vocab*.txt", "*.safetensors"):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{path} holds {len(found)} candidates ({names}): name one of them")
    raise FileNotFoundError(f"{path} holds neither a vocab.txt nor a converted .safetensors file")


def _is_converted(path: Path) -> bool:
    """Whether it is a converted model, whatever its name: a length, then JSON."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return start[7:] == b"\0{"


def _read_text(path: Path) -> str:
    size = path.stat().st_size
    if size > _MAX_VOCAB_BYTES:
        raise ValueError(f"{path} has {size:,} bytes: expected a vocabulary, one token a line")
    data = path.read_bytes()  # not read_text, which would turn "\r\n" into "\n"
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} in line {line};"
            " expected a vocabulary in UTF-8, one token a line"
        ) from None
