"""What a completion looks like in JSON: choices, log-probabilities, usage, stream events.

Source: OpenAI's API reference, "The completion object". Unlike `Generator`, which keeps the stop
string that ended a text, the API leaves it out.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2ml_torch.serving.completions import CompletionRequest
from gpt2ml_torch.serving.scheduler import Piece, TokenInfo
from gpt2ml_torch.tokenizer import Tokenizer
from gpt2ml_torch.tokenizer.decoding import is_bracketed

_LONGEST_GAP = 256  # characters of a text that no token shows, such as a word that is [UNK]


class StopFilter:
    """Withholds the end of a text while it may be the beginning of a stop string.

    The vocabulary has no upper case, so a stop string also counts in lower case.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys([*stops, *(stop.lower() for stop in stops)]))
        self._held = ""

    def put(self, text: str, *, finish_reason: str | None) -> str:
        """The text that is certain now; at the end, all but the stop string."""
        text = self._held + text
        if finish_reason is not None:
            if finish_reason == "stop":
                ended = [stop for stop in self._stops if text.endswith(stop)]
                text = text[: len(text) - max(map(len, ended), default=0)]
            self._held = ""
            return text
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclasses.dataclass
class Choice:
    """One text on its way into JSON."""

    index: int
    request: CompletionRequest
    tokenizer: Tokenizer
    prompt: str

    def __post_init__(self) -> None:
        self._filter = StopFilter(self.request.config.stop)
        self._offset = 0  # characters before the next token
        self.tokens = 0

    def echo(self, prompt_tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        """The prompt as the choice's first part."""
        return self._part(self.prompt, prompt_tokens, None, written=self.prompt)

    def put(self, piece: Piece) -> dict[str, Any]:
        """One piece as a choice of a stream event."""
        self.tokens += len(piece.tokens)
        text = self._filter.put(piece.text, finish_reason=piece.finish_reason)
        return self._part(text, piece.tokens, piece.finish_reason, written=piece.text)

    def _part(
        self,
        text: str,
        tokens: Sequence[TokenInfo],
        finish_reason: str | None,
        *,
        written: str,
    ) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs is not None:
            logprobs = self._logprobs(tokens, written)
        self._offset += len(written)
        return {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: Sequence[TokenInfo], text: str) -> dict[str, Any]:
        names = [self._name(token.id) for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [self._offset + offset for offset in token_offsets(names, text)],
        }

    def _top(self, token: TokenInfo) -> dict[str, float] | None:
        """The best tokens and, as OpenAI's API has it, always the one that was taken."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for id_, logprob in token.top:
            top.setdefault(self._name(id_), logprob)
        top[self._name(token.id)] = token.logprob
        return top

    def _name(self, id_: int) -> str:
        return (self.tokenizer.id_to_token(id_) or "").removeprefix("##")


def token_offsets(names: Sequence[str], text: str) -> list[int]:
    """Where each token begins in the text that they were split from or joined to.

    Tokens are in lower case and without accents, and have no spaces; one that is not found, such as
    [UNK], is taken for one character.
    """
    folded, places = "", []
    for place, character in enumerate(text):
        plain = unicodedata.normalize("NFD", character.lower())
        for part in plain:
            if not unicodedata.combining(part) and not part.isspace():
                folded += part
                places.append(place)
    places.append(len(text))
    offsets, at = [], 0
    for name in names:
        known = not is_bracketed(name)
        found = folded.find(name, at, at + _LONGEST_GAP) if known else at
        found = at if found < 0 else found
        offsets.append(places[min(found, len(folded))])
        at = min(found + (len(name) if known else 1), len(folded))
    return offsets


def join(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The parts of one choice as the choice of a whole response."""
    whole = dict(parts[-1])
    whole["text"] = "".join(part["text"] for part in parts)
    if whole["logprobs"] is not None:
        whole["logprobs"] = {
            name: [value for part in parts for value in part["logprobs"][name]]
            for name in whole["logprobs"]
        }
    return whole


class Envelope:
    """What all events of one response share."""

    def __init__(self, model: str) -> None:
        self._common = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Any], usage: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._common, "choices": list(choices), "usage": dict(usage)}

    def event(self, choices: Sequence[Any], **usage: Any) -> bytes:
        """One event of a stream; `usage` is there where the request asked for it."""
        return encode_event({**self._common, "choices": list(choices), **usage})


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def encode_event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


LAST_EVENT = b"data: [DONE]\n\n"
