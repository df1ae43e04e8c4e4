"""The state of one text in generation: its ids, the characters that are final, and its end."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

from gpt2ml_torch.generation.config import GenerationConfig
from gpt2ml_torch.generation.constraints import Constraints
from gpt2ml_torch.sampling import row_key
from gpt2ml_torch.tokenizer import Tokenizer

_MAX_QUOTED = 80  # characters


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished text.

    `text` was written after `prompt`; `token_ids` and `logprobs` belong to its tokens. The
    log-probabilities are natural logarithms under the model itself, before temperature and bans,
    and empty unless asked for. `finish_reason` is "stop" (a stop string or end token) or "length".
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    score: float | None = None  # beam search: the score by which the beams were ranked

    @property
    def full_text(self) -> str:
        return self.prompt + self.text


class ContinuationDecoder:
    """Decodes the tokens after a prompt; appended to the typed prompt, the pieces form one text."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, prompt_ids: Sequence[int]) -> None:
        self._decoder = tokenizer.stream_decoder()
        shown = "".join([self._decoder.put(id_) for id_ in prompt_ids])
        # Characters of the prompt that the decoder still holds back must not be returned again.
        self._withheld = tokenizer.decode(prompt_ids)[len(shown) :].strip()
        self._after_space = not prompt or prompt[-1].isspace()

    def put(self, id_: int) -> str:
        return self._trim(self._decoder.put(id_))

    def end(self) -> str:
        return self._trim(self._decoder.end())

    def copy(self) -> ContinuationDecoder:
        twin = copy.copy(self)
        twin._decoder = copy.copy(self._decoder)
        return twin

    def _trim(self, piece: str) -> str:
        if not piece:
            return piece
        if self._withheld:
            piece, self._withheld = piece.lstrip().removeprefix(self._withheld), ""
        elif self._after_space:
            piece = piece.lstrip()
        self._after_space = self._after_space and not piece
        return piece


class Text:
    """An unfinished text: `put` takes the next id and returns the characters that are final.

    `row` is its number in the output, `stream` the number of its random stream under its
    configuration's seed.
    """

    def __init__(
        self,
        *,
        row: int,
        stream: int,
        prompt: str,
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer,
        config: GenerationConfig,
        constraints: Constraints,
    ) -> None:
        self.row = row
        self.stream = stream
        self.prompt = prompt
        self.ids = list(prompt_ids)
        self.config = config
        self.constraints = constraints
        self.start = 0  # the first id inside the model's window
        self.logprobs: list[float] = []
        self.written = ""
        self.finish_reason: str | None = None
        self.score: float | None = None
        self.ended_by_token = False
        self._prompt_length = len(prompt_ids)
        self._decoder = ContinuationDecoder(tokenizer, prompt, prompt_ids)
        self._stops = _with_lower_case(constraints.stop)
        self._bad_words = _with_lower_case(constraints.bad_words)

    @property
    def key(self) -> int:
        """The key of its random stream."""
        assert self.config.seed is not None
        return row_key(self.config.seed, self.stream)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self._prompt_length :]

    @property
    def count(self) -> int:
        """The number of tokens written so far."""
        return len(self.ids) - self._prompt_length

    @property
    def to_come(self) -> int:
        """The number of tokens that may still be written."""
        return self.constraints.max_new_tokens - self.count

    @property
    def position(self) -> int:
        """The position of the last id in the model's window."""
        return len(self.ids) - 1 - self.start

    def slide(self, limit: int) -> None:
        """Move the window of `limit` tokens so that `window_keep` tokens stay in it."""
        self.start = len(self.ids) - (self.config.window_keep or (limit + 1) // 2)

    def put(self, id_: int) -> str:
        """Append the next id; returns the text that is now final."""
        if id_ in self.constraints.end_ids:
            self.finish_reason, self.ended_by_token = "stop", True
            return self._show(self._decoder.end())
        self.ids.append(id_)
        piece = self._show(self._decoder.put(id_))
        if not self.finished and self.count >= self.constraints.max_new_tokens:
            piece += self._show(self._decoder.end())
            self.finish_reason = self.finish_reason or "length"
        return piece

    def _show(self, piece: str) -> str:
        if self.count >= self.constraints.min_new_tokens:
            end = _earliest_end(self.written, piece, self._stops)
            if end is not None:
                self.finish_reason = "stop"
                piece = piece[:end]
        self.written += piece
        return piece

    def offends(self, id_: int) -> bool:
        """Whether this id would complete one of the bad words."""
        if not self._bad_words or id_ in self.constraints.end_ids:
            return False
        before = self.prompt.lower() + self.written
        decoder = self._decoder.copy()
        piece = decoder.put(id_) + decoder.end()
        return _earliest_end(before, piece, self._bad_words) is not None

    def copy(self) -> Text:
        twin = copy.copy(self)
        twin.ids, twin.logprobs = list(self.ids), list(self.logprobs)
        twin._decoder = self._decoder.copy()
        return twin

    def become(self, other: Text) -> None:
        """Take over the tokens that another text of the same prompt has written."""
        self.ids, self.written = other.ids, other.written
        self.finish_reason, self.score = other.finish_reason, other.score

    def completion(self) -> Completion:
        return Completion(
            prompt=self.prompt,
            text=self.written,
            token_ids=tuple(self.new_ids),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason or "length",
            score=self.score,
        )


def _with_lower_case(strings: Sequence[str]) -> tuple[str, ...]:
    """The strings and their lower-case forms, since the vocabulary has no upper case."""
    return tuple(dict.fromkeys([*strings, *(string.lower() for string in strings)]))


def _earliest_end(before: str, piece: str, strings: Sequence[str]) -> int | None:
    """The index in `piece` after the first of the strings that ends in it."""
    ends = []
    for string in strings:
        tail = before[len(before) - len(string) + 1 :] if len(string) > 1 else ""
        tail = tail if len(string) - 1 <= len(before) else before
        found = (tail + piece).find(string)
        if found >= 0:
            ends.append(found + len(string) - len(tail))
    return min(ends, default=None)


def shortened(prompt: str) -> str:
    """A prompt as quoted in messages; a long one is cut off."""
    return prompt if len(prompt) <= _MAX_QUOTED else f"{prompt[:_MAX_QUOTED]}..."
