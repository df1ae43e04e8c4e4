"""Tokenizer: text to token ids and back, exactly as the original did it.

Its parts: `words` (text to words), `wordpiece` (words to ids), `decoding` (ids to text), and
`vocabulary` (files).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from gpt2ml_torch.modelfile.reader import ModelFile
from gpt2ml_torch.tokenizer.decoding import (
    StreamDecoder,
    decoded_piece,
    is_bracketed,
    steers_a_terminal,
)
from gpt2ml_torch.tokenizer.vocabulary import (
    MAX_VOCABULARY_BYTES,
    check_tokens,
    find_vocabulary,
    is_converted,
    join_lines,
    read_vocabulary,
    split_lines,
)
from gpt2ml_torch.tokenizer.wordpiece import MAX_WORD_CHARACTERS, WordPiece
from gpt2ml_torch.tokenizer.words import WordSplitter

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Tokenizer:
    """A BERT-format vocabulary, and the conversion of text to ids and back.

    `vocab` is the vocabulary file's text (one token a line, split at "\\n" only) or its tokens.
    `num_embeddings` is the number of rows of the model's embedding where it exceeds the number of
    tokens: the ids in between are reserved, decode to nothing and are never generated.

    Blank lines at the end are dropped if they make more tokens than embeddings.

    Raises ValueError for a vocabulary without [PAD] or [UNK], with more tokens than embeddings,
    with more characters than `MAX_VOCABULARY_BYTES`, or with a line of more than
    `MAX_TOKEN_CHARACTERS`.
    """

    def __init__(self, vocab: str | Sequence[str], *, num_embeddings: int | None = None) -> None:
        self._vocab_text = vocab if isinstance(vocab, str) else join_lines(vocab)
        if len(self._vocab_text) > MAX_VOCABULARY_BYTES:
            raise ValueError(
                f"the vocabulary has {len(self._vocab_text):,} characters; expected at most"
                f" {MAX_VOCABULARY_BYTES:,}, one token a line"
            )
        self._tokens = split_lines(self._vocab_text)
        while (
            self._tokens
            and self._tokens[-1] == ""
            and len(self._tokens) > (num_embeddings or len(self._tokens))
        ):
            self._tokens.pop()
        self._num_embeddings = len(self._tokens) if num_embeddings is None else num_embeddings
        # If a token is on two lines, the later id counts, as in the original.
        self._ids = {token: id_ for id_, token in enumerate(self._tokens)}
        self._check()
        self._words = {t: i for t, i in self._ids.items() if len(t) <= MAX_WORD_CHARACTERS}
        self._wordpiece = WordPiece(self._ids, unk_id=self.unk_id)
        self._splitter = WordSplitter()
        reserved = [""] * (self._num_embeddings - len(self._tokens))
        self._pieces = [decoded_piece(token) for token in self._tokens + reserved]

    def _check(self) -> None:
        check_tokens(self._tokens)
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

        `num_embeddings` defaults to the model's number in a converted file, and otherwise to the
        number of tokens.

        Raises OSError if nothing can be read, and ValueError if the file holds no vocabulary.
        """
        path = find_vocabulary(Path(path))
        if not is_converted(path):
            text = read_vocabulary(path)
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
                ids += self._wordpiece.split(word)
            else:
                ids.append(id_)
        return ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    # -- ids to text ------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`, any iterable of integers or a 1-D tensor.

        Chinese is joined without spaces, and Latin words keep one between them. "##", ids without a
        token and, by default, tokens in square brackets add no text.

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
        pieces = self._pieces if skip_special_tokens else self._all_pieces
        return StreamDecoder(pieces, check=self._checked)

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
        """Ids of the special tokens in the vocabulary, in the order of `SPECIAL_TOKENS`."""
        return tuple(self._ids[token] for token in SPECIAL_TOKENS if token in self._ids)

    @functools.cached_property
    def banned_ids(self) -> tuple[int, ...]:
        """The ids that are never generated, ascending.

        They are special, reserved and empty tokens, [unused1] and the like, and tokens that a later
        line repeats.
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
        """`_pieces`, with the tokens in square brackets as text."""
        pieces = list(self._pieces)
        for id_, token in enumerate(self._tokens):
            if is_bracketed(token) and not steers_a_terminal(token):
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
